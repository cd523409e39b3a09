"""A dense layer."""

import jax
from flax import nnx


class Dense(nnx.Module):
    """A linear map of the flattened input, followed by a gelu unless it is the last layer."""

    def __init__(
        self, in_features: int, out_features: int, last: bool = False, *, rngs: nnx.Rngs
    ) -> None:
        self.linear = nnx.Linear(in_features, out_features, rngs=rngs)
        self.last = last

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x.reshape(x.shape[0], -1))
        return y if self.last else jax.nn.gelu(y)
