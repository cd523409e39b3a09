"""Build residual networks with batch norm."""

from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.pooling import max_pool
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.checks import check_count, check_counts
from gpipe_jax.zoo.basic import ConvHead


class ConvBatchNorm(nnx.Module):
    """Apply a convolution without bias, then batch norm: x [B, H, W, C] -> [B, H', W', F].

    The running statistics have the momentum 0.9.
    """

    def __init__(
        self, in_features: int, features: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        self.conv = Conv(in_features, features, size, stride, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class ConvNormRelu(ConvBatchNorm):
    """Apply a convolution without bias, batch norm, relu: x [B, H, W, C] -> [B, H', W', F]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(super().__call__(x))


class MaxPool(nnx.Module):
    """Take the maximum in 3x3 windows, at half the resolution."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return max_pool(x, 3, 2)


class BottleneckStart(nnx.Module):
    """Map x to (y, x): a 1x1 convolution to fewer features, and the input to stash."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.reduce = ConvNormRelu(in_features, features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.reduce(x), x


class BottleneckEnd(nnx.Module):
    """Map (y, popped input x) to relu(norm(1x1 convolution of y) + x).

    `in_features` is the width of y. If shapes change, x passes a 1x1 convolution and batch norm,
    and `shortcut_features` is its width; else that is None.
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

    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, x = inputs
        return jax.nn.relu(self.expand(y) + (x if self.shortcut is None else self.shortcut(x)))


EXPANSION = 4  # output features of a bottleneck over its inner features
SKIP = "identity"  # name of the stashed input of a bottleneck


def resnet(
    depths: Sequence[int] = (3, 4, 23, 3),
    *,
    width: int = 64,
    classes: int = 1000,
    in_channels: int = 3,
    stem: Literal["imagenet", "small"] = "imagenet",
) -> list[Layer]:
    """Build ResNet-101, or a ResNet of other depths.

    Group i has `depths[i]` bottlenecks of `width` x 2^i inner features. Each group after the first
    has half the resolution of the one before. A bottleneck is three layers, with a skip from the
    first to the third, so a stage can end inside it.

    Source: He et al., https://arxiv.org/abs/1512.03385, table 1. The stride is in the 3x3
    convolution of a bottleneck, as in torchgpipe's benchmark (He et al.: in the first 1x1 one).

    Args:
        depths: Bottlenecks of each group. Default: (3, 4, 23, 3); ResNet-50 is (3, 4, 6, 3).
        width: Inner features of the first group. Default: 64.
        classes: Number of classes. Default: 1000.
        in_channels: Channels of the images. Default: 3.
        stem: "imagenet" divides the resolution by four; "small", a 3x3 convolution, keeps it.
            Default: "imagenet".

    Returns:
        Layers from images [B, H, W, in_channels] to scores [B, classes].

    Raises:
        ValueError: A number is less than 1, `depths` is empty, or the stem is unknown.

    Example:
        >>> len(resnet((1, 1), stem="small"))
        8
    """
    if stem not in ("imagenet", "small"):
        raise ArgumentError("stem", f"`stem` is {stem!r}: use 'imagenet' or 'small'")
    check_counts(width=width, classes=classes, in_channels=in_channels)
    if not depths:
        raise ArgumentError(
            "depths", "`depths` is empty; give the bottlenecks of at least one group"
        )
    for depth in depths:
        check_count("depths", depth)
    first = {"in_features": in_channels, "features": width}
    if stem == "imagenet":
        layers = [layer(ConvNormRelu, size=7, stride=2, **first), layer(MaxPool)]
    else:
        layers = [layer(ConvNormRelu, size=3, stride=1, **first)]
    before = width
    for i, depth in enumerate(depths):
        inner = width * 2**i
        for j in range(depth):
            layers += _bottleneck(before, inner, stride=2 if i > 0 and j == 0 else 1)
            before = EXPANSION * inner
    return [*layers, layer(ConvHead, in_features=before, classes=classes)]


def _bottleneck(before: int, inner: int, stride: int) -> list[Layer]:
    after = EXPANSION * inner
    changes = stride > 1 or before != after
    shortcut = {"shortcut_features": before, "stride": stride} if changes else {}
    return [
        layer(BottleneckStart, in_features=before, features=inner).stash(SKIP),
        layer(ConvNormRelu, in_features=inner, features=inner, stride=stride),
        layer(BottleneckEnd, in_features=inner, features=after, **shortcut).pop(SKIP),
    ]
