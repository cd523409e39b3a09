"""Residual networks with batch norm as lists of layers."""

from collections.abc import Sequence
from typing import Literal

from gpipe_jax.layers.conv import ConvHead
from gpipe_jax.layers.layer import Layer, check_counts, layer
from gpipe_jax.zoo.resnet_layers import BottleneckEnd, BottleneckStart, ConvNormRelu, MaxPool

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
