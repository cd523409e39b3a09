"""Build small networks for small images."""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx

from gpipe_jax.layers.conv import Conv
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.describe import layer


class Dense(nnx.Module):
    """Apply a linear map to the flattened input, then a gelu unless it is the last layer."""

    def __init__(
        self, in_features: int, out_features: int, last: bool = False, *, rngs: nnx.Rngs
    ) -> None:
        self.linear = nnx.Linear(in_features, out_features, rngs=rngs)
        self.last = last

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x.reshape(x.shape[0], -1))
        return y if self.last else jax.nn.gelu(y)


def group_norm(features: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Return a group norm with four groups, or as many as divide the features."""
    return nnx.GroupNorm(features, num_groups=math.gcd(features, 4), rngs=rngs)


class ConvStem(nnx.Module):
    """Map images to features: convolution, group norm, relu."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(in_features, features, rngs=rngs)
        self.norm = group_norm(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(x)))


class ResidualBlock(nnx.Module):
    """Compute x + conv(relu(norm(conv(relu(norm(x)))))), with a 1x1 convolution of x if needed."""

    def __init__(self, in_features: int, features: int, stride: int = 1, *, rngs: nnx.Rngs) -> None:
        self.norm1 = group_norm(in_features, rngs)
        self.conv1 = Conv(in_features, features, stride=stride, rngs=rngs)
        self.norm2 = group_norm(features, rngs)
        self.conv2 = Conv(features, features, rngs=rngs)
        same = stride == 1 and in_features == features
        self.shortcut = None if same else Conv(in_features, features, 1, stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.relu(self.norm1(x)))
        y = self.conv2(jax.nn.relu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ConvHead(nnx.Module):
    """Map features to class scores [B, classes]: relu, mean over positions, linear map."""

    def __init__(self, in_features: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(in_features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(jax.nn.relu(x).mean((1, 2)))


def convnet(
    widths: Sequence[int] = (16, 32, 64),
    depths: Sequence[int] = (2, 3, 2),
    *,
    in_channels: int = 1,
    classes: int = 10,
) -> list[Layer]:
    """Build a small residual network with group norm, which needs no batch statistics.

    It is a stem, then `depths[i]` residual blocks of `widths[i]` features, then a head. Each group
    of blocks after the first has half the resolution of the one before.

    Args:
        widths: Features of each group of blocks. Default: (16, 32, 64).
        depths: Blocks of each group, as many numbers as `widths`. Default: (2, 3, 2).
        in_channels: Channels of the images. Default: 1.
        classes: Number of classes. Default: 10.

    Returns:
        Layers from images [B, H, W, in_channels] to scores [B, classes].

    Raises:
        ValueError: `widths` and `depths` have different lengths.

    Example:
        >>> len(convnet((8, 16), (1, 1)))
        4
    """
    if len(widths) != len(depths):
        raise ValueError(f"{len(widths)} `widths` but {len(depths)} `depths`; give as many of both")
    layers = [layer(ConvStem, in_features=in_channels, features=widths[0])]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            first = j == 0 and i > 0
            before = widths[i - 1] if first else width
            stride = 2 if first else 1
            layers.append(layer(ResidualBlock, in_features=before, features=width, stride=stride))
    return [*layers, layer(ConvHead, in_features=widths[-1], classes=classes)]


def mlp(features: Sequence[int] = (64, 128, 128, 10)) -> list[Layer]:
    """Build a multilayer perceptron: linear maps with gelus between them.

    Args:
        features: The width of the flattened input, of each hidden layer, and of the output.
            Default: (64, 128, 128, 10).

    Returns:
        One layer fewer than there are widths, from inputs [B, ...] to outputs [B, features[-1]].

    Example:
        >>> len(mlp((64, 128, 10)))
        2
    """
    pairs = list(pairwise(features))
    return [
        layer(Dense, in_features=a, out_features=b, last=i == len(pairs) - 1)
        for i, (a, b) in enumerate(pairs)
    ]
