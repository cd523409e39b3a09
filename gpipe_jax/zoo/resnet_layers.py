"""The parts of a residual network with batch norm: a convolution, and a bottleneck in three layers.

He et al., Deep Residual Learning for Image Recognition, figure 5 (right).
"""

import jax
from flax import nnx

from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.pooling import max_pool


class ConvBatchNorm(nnx.Module):
    """Convolution without bias, then batch norm; x [B, H, W, C] -> [B, H', W', F].

    The running statistics keep 0.9 of themselves in a step.
    """

    def __init__(
        self, in_features: int, features: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        self.conv = Conv(in_features, features, size, stride, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class ConvNormRelu(ConvBatchNorm):
    """Convolution without bias, batch norm, relu; x [B, H, W, C] -> [B, H', W', F]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(super().__call__(x))


class MaxPool(nnx.Module):
    """The maximum in 3x3 windows at half the resolution."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, 3, 2)


class BottleneckStart(nnx.Module):
    """x to (y, x): a 1x1 convolution to fewer features, and the input to be stashed."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.reduce = ConvNormRelu(in_features, features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.reduce(x), x


class BottleneckEnd(nnx.Module):
    """(y, popped input x) to relu(norm(1x1 convolution of y) + x).

    `in_features` are those of y. Where shapes change x passes a 1x1 convolution and batch norm;
    `shortcut_features` are those of x there, else None.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        shortcut_features: int | None = None,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.expand = ConvBatchNorm(in_features, features, 1, rngs=rngs)
        changed = shortcut_features is not None
        self.shortcut = (
            ConvBatchNorm(shortcut_features, features, 1, stride, rngs=rngs) if changed else None
        )

    def __call__(self, taken: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, x = taken
        return jax.nn.relu(self.expand(y) + (x if self.shortcut is None else self.shortcut(x)))
