"""Implement the operations of an AmoebaNet's cells as nnx modules.

`OPERATIONS[name](in_features, features, stride, norm=..., rngs=...)` maps x [B, H, W, in_features]
to [B, ceil(H / stride), ceil(W / stride), features]. The operations are those of AmoebaNet's code
(tensorflow/tpu, models/official/amoeba_net/network_utils.py), with padding "SAME".
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from gpipe_jax.layers.pooling import avg_pool, max_pool
from gpipe_jax.zoo.amoebanet.conv_norm import (
    ConvNorm,
    Identity,
    Normalization,
    SeparableNorm,
    match,
)

POOLS: dict[str, Callable] = {"avg": avg_pool, "max": max_pool}


class Pool(nnx.Module):
    """Take the mean or maximum of windows; if the width changes, match it by a 1x1 convolution."""

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        kind: str,
        size: int,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        self.match = match(in_features, features, 1, relu=False, norm=norm, rngs=rngs)
        self.kind, self.size, self.stride = kind, size, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.match(POOLS[self.kind](x, self.size, self.stride))


def identity(
    in_features: int, features: int, stride: int, *, norm: Normalization, rngs: nnx.Rngs
) -> nnx.Module:
    """Return a module for x itself, or for its 1x1 convolution if the shape changes."""
    if stride == 1 and in_features == features:
        return Identity()
    return ConvNorm(in_features, features, stride, norm=norm, rngs=rngs)


def separable(
    in_features: int,
    features: int,
    stride: int,
    *,
    size: int,
    dilation: int = 1,
    norm: Normalization,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return two separable convolutions, the first with the stride."""
    conv = functools.partial(SeparableNorm, size=size, dilation=dilation, norm=norm, rngs=rngs)
    return nnx.Sequential(conv(in_features, features, stride), conv(features, features))


def bottleneck(
    in_features: int,
    features: int,
    stride: int,
    *,
    sizes: tuple[tuple[int, int], ...],
    norm: Normalization,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return convolutions of these sizes [h, w] at a quarter of the width, between 1x1 ones."""
    narrow = max(1, features // 4)
    conv = functools.partial(ConvNorm, norm=norm, rngs=rngs)
    middle = [conv(narrow, narrow, stride, size=size) for size in sizes]
    return nnx.Sequential(conv(in_features, narrow), *middle, conv(narrow, features))


OPERATIONS: dict[str, Callable[..., nnx.Module]] = {
    "identity": identity,
    "sep_3x3": functools.partial(separable, size=3),
    "sep_5x5": functools.partial(separable, size=5),
    "sep_7x7": functools.partial(separable, size=7),
    "avg_pool_3x3": functools.partial(Pool, kind="avg", size=3),
    "max_pool_3x3": functools.partial(Pool, kind="max", size=3),
    "dil_sep_3x3": functools.partial(separable, size=3, dilation=2),
    "conv_1x7_7x1": functools.partial(bottleneck, sizes=((1, 7), (7, 1))),
    "conv_1x1": ConvNorm,
    "conv_3x3": functools.partial(bottleneck, sizes=((3, 3),)),
    "max_pool_2x2": functools.partial(Pool, kind="max", size=2),
    # Not dilated: AmoebaNet's code reads its name, dil_2_separable_5x5_2, as two 5x5 ones.
    "dil_2_sep_5x5": functools.partial(separable, size=5),
}
"""Builders of the operations in `gpipe_jax.genotypes.genotype`, by name."""
