"""Build a U-Net.

level 0   convolutions -> Down ......... skip "level 0" ......... Up -> convolutions -> head
level 1          convolutions -> Down .. skip "level 1" .. Up -> convolutions
bottom                       convolutions ------------------^
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.pooling import max_pool
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.checks import check_counts
from gpipe_jax.zoo.resnet import ConvNormRelu


class Down(nnx.Module):
    """Map x [B, H, W, C] to ([B, H/2, W/2, C], x): the maxima of 2x2 squares, and x to stash.

    `halvings` counts this one and those after it.
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
    """Map (x [B, H, W, C], popped [B, 2H, 2W, C']) to [B, 2H, 2W, C + C'], repeating pixels."""

    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, popped = inputs
        larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jnp.concatenate([larger, popped], axis=-1)


class SegmentationHead(nnx.Module):
    """Map x [B, H, W, C] to scores [B, H, W, classes] of each pixel by a 1x1 convolution."""

    def __init__(self, in_features: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(in_features, classes, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


def unet(
    *,
    depth: int = 5,
    convolutions: int = 5,
    channels: int = 64,
    in_channels: int = 3,
    classes: int = 1,
) -> list[Layer]:
    """Build a U-Net, which gives scores for each pixel.

    Level i on the way down has `convolutions` convolutions of C 2^i features, then halves the
    resolution. Its features skip to level i on the way up, which has C 2^(i-1) features. Each
    convolution, with batch norm and relu, is a layer of its own.

    Source: Ronneberger et al., https://arxiv.org/abs/1505.04597, with the sizes of torchgpipe's
    benchmark U-Net (B, C) = (`convolutions`, `channels`). torchgpipe has instance norm without
    parameters, leaky relu and dropout in place of batch norm and relu. The numbers of parameters
    agree except for those of batch norm, about one in 5000.

    Args:
        depth: How often the resolution is halved. Default: 5.
        convolutions: Convolutions on each level, each way. Default: 5.
        channels: C, features of the first level; even. Default: 64.
        in_channels: Channels of the images. Default: 3.
        classes: Number of classes. Default: 1.

    Returns:
        Layers from images [B, H, W, in_channels] to scores [B, H, W, classes]. H and W must be
        multiples of 2^depth.

    Raises:
        ValueError: A number is less than 1, or `channels` is odd.

    Example:
        >>> len(unet(depth=1, convolutions=1, channels=4))
        6
    """
    check_counts(depth=depth, convolutions=convolutions, channels=channels, classes=classes)
    if channels % 2:
        raise ArgumentError(
            "channels", f"`channels` is {channels}, but the last level has half of them: use even"
        )
    level = [channels * 2**i for i in range(depth)]
    layers, before = [], in_channels
    for i, width in enumerate(level):
        layers += _convolutions([before, *[width] * convolutions])
        layers.append(layer(Down, halvings=depth - i).stash(f"level {i}"))
        before = width
    layers += _convolutions([before, *[2 * before] * (convolutions - 1), before])
    for i, width in reversed(list(enumerate(level))):
        layers.append(layer(Up).pop(f"level {i}"))
        layers += _convolutions([2 * width, *[width // 2] * convolutions])
    return [*layers, layer(SegmentationHead, in_features=channels // 2, classes=classes)]


def _convolutions(widths: list[int]) -> list[Layer]:
    return [layer(ConvNormRelu, in_features=a, features=b) for a, b in pairwise(widths)]
