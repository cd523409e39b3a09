"""Small networks for small images."""

from collections.abc import Sequence
from itertools import pairwise

from gpipe_jax.layers.conv import ConvHead, ConvStem, ResidualBlock
from gpipe_jax.layers.layer import Layer, layer
from gpipe_jax.zoo.dense_layers import Dense


def convnet(
    widths: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] = (2, 3, 2),
    *,
    in_channels: int = 1,
    classes: int = 10,
) -> list[Layer]:
    """A residual network with group norm: images [B, H, W, in_channels] to scores [B, classes].

    A stem, then `depths[i]` residual blocks of `widths[i]` features, each group after the first at
    half the resolution of the one before, then a head. Needs no batch statistics.
    """
    if len(widths) != len(depths):
        raise ValueError(f"{len(widths)} `widths` but {len(depths)} `depths`; give one for one")
    layers = [layer(ConvStem, in_features=in_channels, features=widths[0])]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            first = j == 0 and i > 0
            before = widths[i - 1] if first else width
            stride = 2 if first else 1
            layers.append(layer(ResidualBlock, in_features=before, features=width, stride=stride))
    return [*layers, layer(ConvHead, in_features=widths[-1], classes=classes)]


def mlp(features: Sequence[int] = (64, 128, 128, 10)) -> list[Layer]:
    """Dense layers between these widths, from input to output; inputs are flattened."""
    pairs = list(pairwise(features))
    return [
        layer(Dense, in_features=a, out_features=b, last=i == len(pairs) - 1)
        for i, (a, b) in enumerate(pairs)
    ]
