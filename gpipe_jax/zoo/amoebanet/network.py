"""AmoebaNets, and other networks of such cells, as lists of layers.

The construction is that of tensorflow/tpu, models/official/amoeba_net/model_builder.py: with it the
numbers of parameters are the published ones. Widths that do not divide are rounded down.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Cell, Genotype
from gpipe_jax.layers.layer import Layer, check_counts, layer
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import POOL, AmoebaCell, AuxiliaryHead, Classifier, Stem


class Spot(NamedTuple):
    """One cell of a network."""

    cell: Cell
    features: int  # of each of its states
    stride: int

    @property
    def width(self) -> int:
        """Features of its output."""
        return len(self.cell.concat) * self.features


class StemPlan(NamedTuple):
    """The first convolution, 3x3, and the widths of the reduction cells right behind it."""

    features: int
    stride: int
    padding: str
    cells: tuple[int, ...]


def amoebanet(
    genotype: str | Genotype = "D",
    *,
    layers: int = 18,
    filters: int = 256,
    image: int = 224,
    classes: int = 1000,
    stem: str = "imagenet",
    in_channels: int = 3,
    auxiliary: bool = False,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    batch_norm_momentum: float = 0.9997,
    sync_batch_norm: bool = False,
    dtype: str = "float32",
) -> list[Layer]:
    """Images [B, image, image, in_channels] to scores [B, classes], every cell being one layer.

    A stem, then three stacks of `layers` / 3 normal cells, of `filters`, 2 `filters` and 4
    `filters`, with a reduction cell before the second and the third, then a classifier. In the
    GPipe paper this is AmoebaNet-D (layers, filters). The stem is a 3x3 convolution:

        "imagenet"    of 32 features and stride 2, then reduction cells of a quarter and a half of
                      the filters: AmoebaNet's code
        "torchgpipe"  of a quarter of the filters and stride 2, then reduction cells of a half of
                      the filters and of all: the benchmarks of torchgpipe
        "cifar"       of three times the filters: NASNet

    With `auxiliary` a second classifier reads the second stack, and the output is (scores,
    auxiliary scores). `drop_path` is the probability at the last cell at the end of training, from
    which it falls linearly towards the first cell and the start; so cells that are equal but for
    their place do not share code. Batch norm is over a micro-batch, or with `sync_batch_norm` over
    those of all replicas; AmoebaNet's code has the momentum 0.9997 and NASNet's 0.9 for CIFAR-10.
    Layers compute in `dtype`; parameters and scores are float32.
    """
    _check_counts(layers, classes=classes, in_channels=in_channels, image=image, filters=filters)
    _check_fractions(drop_path=drop_path, dropout=dropout, batch_norm_momentum=batch_norm_momentum)
    first = _stem(stem, filters)
    spots = _spots(_genotype(genotype), first, layers // 3, filters)
    head = len(spots) - layers // 3 - 1  # the cells of the stem and of the first two stacks
    sizes = _checked_sizes(image, first, spots, head if auxiliary else None)
    norm = Normalization(batch_norm_momentum, DATA if sync_batch_norm else None)

    kind = {"features": first.features, "stride": first.stride, "padding": first.padding}
    start = layer(Stem, in_features=in_channels, dtype=dtype, norm=norm, **kind)
    cells = _cells(spots, first.features, drop_path, norm)
    end = {"in_features": spots[-1].width, "classes": classes, "dropout": dropout}
    if not auxiliary:
        return [start, *cells, layer(Classifier, **end)]
    there = {"in_features": spots[head - 1].width, "size": sizes[head]}
    extra = layer(AuxiliaryHead, classes=classes, norm=norm, **there).stash("auxiliary")
    last = layer(Classifier, auxiliary=True, **end).pop("auxiliary")
    return [start, *cells[:head], extra, *cells[head:], last]


def _spots(genotype: Genotype, first: StemPlan, repeats: int, filters: int) -> list[Spot]:
    spots = [Spot(genotype.reduction, features, 2) for features in first.cells]
    for features in (filters, 2 * filters, 4 * filters):
        if features > filters:
            spots.append(Spot(genotype.reduction, features, 2))
        spots += [Spot(genotype.normal, features, 1)] * repeats
    return spots


def _cells(spots: Sequence[Spot], width: int, drop_path: float, norm: Normalization) -> list[Layer]:
    """One layer for each cell, behind a stem of that width."""
    result, skip_features, skip_stride = [], None, 1
    for i, spot in enumerate(spots):
        cell = layer(
            AmoebaCell,
            cell=spot.cell,
            features=spot.features,
            in_features=width,
            skip_features=skip_features,
            stride=spot.stride,
            skip_stride=skip_stride,
            drop_path=drop_path * (i + 1) / len(spots),
            norm=norm,
        )
        result.append(cell)
        width, skip_features, skip_stride = spot.width, width, spot.stride
    return result


def _genotype(genotype: str | Genotype) -> Genotype:
    if isinstance(genotype, Genotype):
        return genotype
    if genotype not in GENOTYPES:
        raise ValueError(
            f"`genotype` is {genotype!r}, but the published ones are {', '.join(GENOTYPES)}; "
            f"give one of these letters, or a Genotype"
        )
    return GENOTYPES[genotype]


def _stem(name: str, filters: int) -> StemPlan:
    stems = {
        "imagenet": StemPlan(32, 2, "VALID", (filters // 4, filters // 2)),
        "torchgpipe": StemPlan(filters // 4, 2, "SAME", (filters // 2, filters)),
        "cifar": StemPlan(3 * filters, 1, "SAME", ()),
    }
    if name not in stems:
        raise ValueError(f"`stem` is {name!r}, but there are {', '.join(stems)}; use one of these")
    least = {"imagenet": 8, "torchgpipe": 4, "cifar": 2}[name]
    if filters < least:
        raise ValueError(
            f"`filters` is {filters}, but the narrowest cell needs 2 features, which behind the "
            f"stem {name!r} means {least} filters; give at least {least}"
        )
    return stems[name]


# --- checks ---------------------------------------------------------------------------------------


def _check_counts(layers: int, **counts: int) -> None:
    check_counts(layers=layers, **counts)
    if layers % 3:
        raise ValueError(
            f"`layers` is {layers}, but the normal cells are in three equal stacks; "
            f"give a multiple of 3, as {-(-layers // 3) * 3}"
        )


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` is {value}, but it is a fraction; use 0 or more, below 1")


def _checked_sizes(
    image: int, first: StemPlan, spots: Sequence[Spot], head: int | None
) -> list[int]:
    """The sizes for such an image; ValueError if it is too small for a reduction or the head."""
    sizes = _sizes(image, first, spots)
    lack = _lack(sizes, spots, head)
    if lack:
        enough = image
        while _lack(_sizes(enough, first, spots), spots, head):
            enough += 1
        raise ValueError(f"`image` is {image}, but {lack}; give {enough} or more")
    return sizes


def _sizes(image: int, first: StemPlan, spots: Sequence[Spot]) -> list[int]:
    """Height and width of the features in front of each cell, and behind the last."""
    room = image - 2 if first.padding == "VALID" else image
    sizes = [math.ceil(room / first.stride)]
    for spot in spots:
        sizes.append(math.ceil(sizes[-1] / spot.stride))
    return sizes


def _lack(sizes: Sequence[int], spots: Sequence[Spot], head: int | None) -> str:
    """What these sizes are too small for, or nothing."""
    for i, (size, spot) in enumerate(zip(sizes, spots, strict=False), 1):
        if spot.stride > 1 and size < 2:
            return f"cell {i} of {len(spots)} halves its input, which would be {size}x{size} there"
    if head is not None and sizes[head] < POOL:
        size = f"{sizes[head]}x{sizes[head]}"
        return f"the auxiliary head pools {POOL}x{POOL} of its input, which would be {size} there"
    return ""
