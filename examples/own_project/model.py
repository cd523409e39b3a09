"""Define the network, the loss, a metric and a callback that config.yaml names."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gpipe_jax as gpipe


class Block(nnx.Module):
    """Add a gated hidden layer to the input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x + W (u * sigmoid(v))."""
        u, v = jnp.split(self.up(self.norm(x)), 2, axis=-1)
        return x + self.down(u * jax.nn.sigmoid(v))


def layers(width: int, depth: int) -> list:
    """Return the network: a list of layers, which the pipeline divides into stages."""
    return [
        gpipe.layer(nnx.Linear, in_features=8, out_features=width),
        *[gpipe.layer(Block, width=width)] * depth,
        gpipe.layer(nnx.Linear, in_features=width, out_features=1),
    ]


def huber(outputs: jax.Array, labels: jax.Array, delta: float = 1.0) -> jax.Array:
    """Return one loss for each example."""
    return optax.huber_loss(outputs, labels, delta=delta)


def mean_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Return one number for each example; the run logs the mean."""
    return jnp.abs(outputs - labels)


def stop_below(record: dict, error: float) -> bool:
    """Return whether the run is done: its held-out error is small enough."""
    return record.get("test_mean_error", error) < error
