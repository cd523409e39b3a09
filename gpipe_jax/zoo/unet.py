"""A U-Net as a list of layers."""

from itertools import pairwise

from gpipe_jax.layers.layer import Layer, check_counts, layer
from gpipe_jax.zoo.resnet_layers import ConvNormRelu
from gpipe_jax.zoo.unet_layers import Down, SegmentationHead, Up


def unet(
    *,
    depth: int = 5,
    convolutions: int = 5,
    channels: int = 64,
    in_channels: int = 3,
    classes: int = 1,
) -> list[Layer]:
    """Images [B, H, W, in_channels] to scores [B, H, W, classes] of every pixel.

    Ronneberger et al., with the sizes of torchgpipe's benchmark U-Net (B, C) = (`convolutions`,
    `channels`). Level i on the way down has that many convolutions of C 2^i features, then half the
    resolution; its features skip to level i on the way up, of C 2^(i-1) features. H and W are
    multiples of 2^depth. Each convolution, with batch norm and relu, is a layer of its own.

    torchgpipe has instance norm without parameters, leaky relu and dropout in place of batch norm
    and relu. The numbers of parameters agree but for the batch norms', about one in 5000.
    """
    check_counts(depth=depth, convolutions=convolutions, channels=channels, classes=classes)
    if channels % 2:
        raise ValueError(f"`channels` is {channels}, but the last level has half of them: use even")
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
