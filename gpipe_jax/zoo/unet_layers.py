"""The parts of a U-Net beside its convolutions: ways down and up, and the head.

Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, figure 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.pooling import max_pool


class Down(nnx.Module):
    """x [B, H, W, C] to ([B, H/2, W/2, C], x): the maxima of 2x2 squares, and x to be stashed.

    `halvings` are this one and those that come after it.
    """

    def __init__(self, halvings: int) -> None:
        self.halvings = halvings

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (height, width), unit = x.shape[1:3], 2**self.halvings
        if height % unit or width % unit:
            up = [-(-n // unit) * unit for n in (height, width)]
            raise ValueError(
                f"images of {height} x {width} cannot be halved {self.halvings} times: both must "
                f"be multiples of {unit}; pad them to {up[0]} x {up[1]}, or use a smaller depth"
            )
        return max_pool(x, 2, 2), x


class Up(nnx.Module):
    """(x [B, H, W, C], popped [B, 2H, 2W, C']) to [B, 2H, 2W, C + C']: each pixel four times."""

    def __call__(self, taken: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, popped = taken
        larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jnp.concatenate([larger, popped], axis=-1)


class SegmentationHead(nnx.Module):
    """x [B, H, W, C] to class scores [B, H, W, classes] of each pixel: a 1x1 convolution."""

    def __init__(self, in_features: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(in_features, classes, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)
