"""Residual networks with batch norm as lists of layers."""

from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.layer import Layer, check_counts, layer
from gpipe_jax.layers.pooling import max_pool
from gpipe_jax.zoo.basic import ConvHead


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


EXPANSION = 4  # output features of a bottleneck over its inner ones
SKIP = "identity"


def resnet(
    depths: Sequence[int] = (3, 4, 23, 3),
    *,
    width: int = 64,
    classes: int = 1000,
    in_channels: int = 3,
    stem: Literal["imagenet", "small"] = "imagenet",
) -> list[Layer]:
    """ResNet-101, or of other depths: images [B, H, W, in_channels] to scores [B, classes].

    He et al., table 1; (3, 4, 6, 3) is ResNet-50. Group i has `depths[i]` bottlenecks of
    `width` x 2^i inner features, each group after the first at half the resolution of the one
    before. The stem divides the resolution by four; the "small" one, a 3x3 convolution, keeps it.

    A bottleneck is three layers, and its input a skip from the first to the third, so a cut can be
    inside. As in torchgpipe's benchmark its 3x3 convolution has the stride (He et al.: the first).
    """
    if stem not in ("imagenet", "small"):
        raise ValueError(f"`stem` is {stem!r}: use 'imagenet' or 'small'")
    check_counts(width=width, classes=classes, in_channels=in_channels)
    if not depths:
        raise ValueError("`depths` is empty; give the bottlenecks of at least one group")
    for depth in depths:
        check_counts(depths=depth)
    large = stem == "imagenet"
    size, stride = (7, 2) if large else (3, 1)
    first = {"in_features": in_channels, "features": width}
    layers = [layer(ConvNormRelu, size=size, stride=stride, **first)]
    layers += [layer(MaxPool)] * large
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
