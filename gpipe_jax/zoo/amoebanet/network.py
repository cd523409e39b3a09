"""Build AmoebaNets, and other networks of such cells.

    stem -> its reductions -> stack 1 -> reduction -> stack 2 -> reduction -> stack 3 -> classifier
                                                         |
                                                         +-> auxiliary head

The construction is that of tensorflow/tpu, models/official/amoeba_net/model_builder.py, and the
numbers of parameters are the published ones. Fractional widths are rounded down.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.errors import ArgumentError
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Cell, Genotype
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.checks import check_counts, check_fraction
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import POOL, AmoebaCell, AuxiliaryHead, Classifier, Stem


class PlacedCell(NamedTuple):
    """Describe one cell at its place in a network."""

    cell: Cell
    features: int  # of each of its states
    stride: int

    @property
    def width(self) -> int:
        """Return the number of features of the cell's output."""
        return len(self.cell.concat) * self.features


class StemShape(NamedTuple):
    """Describe the first convolution, 3x3, and the widths of the reduction cells right after it."""

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
    """Build an AmoebaNet, or a network of other cells. Each cell is one layer.

    It is a stem, then three stacks of `layers` / 3 normal cells with F, 2 F and 4 F filters, with a
    reduction cell before the second and the third stack, then a classifier. The GPipe paper writes
    AmoebaNet-D (layers, F).

    Source: Real et al., https://arxiv.org/abs/1802.01548, and its code in tensorflow/tpu.

    Args:
        genotype: The cells: "A", "B", "C" or "D" for the published ones, or a `Genotype`. Default:
            "D".
        layers: Number of normal cells, a multiple of 3. Default: 18.
        filters: F, features of each state of the first stack. Default: 256.
        image: Height and width of the images, in pixels. Default: 224.
        classes: Number of classes. Default: 1000.
        stem: A 3x3 convolution and the reduction cells after it. Default: "imagenet".

            "imagenet":   32 features, stride 2; then reductions of F/4 and F/2 (AmoebaNet's code)
            "torchgpipe": F/4 features, stride 2; then reductions of F/2 and F (its benchmarks)
            "cifar":      3 F features, stride 1; no reductions (NASNet)
        in_channels: channels of the images. Default 3.
        auxiliary: whether a second classifier reads the second stack. Default False.
        drop_path: probability to drop a path in the last cell at the end of training. It falls
            linearly towards the first cell and towards the start. So equal cells at different
            places do not share compiled code. Default 0.
        dropout: probability to drop a feature before the classifier. Default 0.
        batch_norm_momentum: decay of the running statistics in a step. Default 0.9997, as in
            AmoebaNet's code; NASNet has 0.9 for CIFAR-10.
        sync_batch_norm: whether batch norm averages over the micro-batches of all replicas, and not
            of one. Default False.
        dtype: type to compute in; parameters and scores are float32. Default "float32".

    Returns:
        Layers from images [B, image, image, in_channels] to scores [B, classes], or with
        `auxiliary` to a pair (scores, auxiliary scores).

    Raises:
        ValueError: An argument is out of range, or the images are too small for the reductions.

    Example:
        >>> len(amoebanet("D", layers=3, filters=8, classes=10, image=32))
        9
    """
    check_counts(
        layers=layers, classes=classes, in_channels=in_channels, image=image, filters=filters
    )
    if layers % 3:
        raise ArgumentError(
            "layers",
            f"`layers` is {layers}, but the normal cells are in three equal stacks; "
            f"give a multiple of 3, as {-(-layers // 3) * 3}",
        )
    check_fraction("drop_path", drop_path)
    check_fraction("dropout", dropout)
    check_fraction("batch_norm_momentum", batch_norm_momentum)
    first = _stem(stem, filters)
    placed = _place_cells(_genotype(genotype), first, layers // 3, filters)
    head = len(placed) - layers // 3 - 1  # the cells of the stem and of the first two stacks
    sizes = _checked_sizes(image, first, placed, head if auxiliary else None)
    norm = Normalization(batch_norm_momentum, DATA if sync_batch_norm else None)

    shape = {"features": first.features, "stride": first.stride, "padding": first.padding}
    stem_layer = layer(Stem, in_features=in_channels, dtype=dtype, norm=norm, **shape)
    cells = _cells(placed, first.features, drop_path, norm)
    options = {"in_features": placed[-1].width, "classes": classes, "dropout": dropout}
    if not auxiliary:
        return [stem_layer, *cells, layer(Classifier, **options)]
    shape = {"in_features": placed[head - 1].width, "size": sizes[head]}
    auxiliary_head = layer(AuxiliaryHead, classes=classes, norm=norm, **shape).stash("auxiliary")
    classifier = layer(Classifier, auxiliary=True, **options).pop("auxiliary")
    return [stem_layer, *cells[:head], auxiliary_head, *cells[head:], classifier]


def _place_cells(
    genotype: Genotype, first: StemShape, repeats: int, filters: int
) -> list[PlacedCell]:
    placed = [PlacedCell(genotype.reduction, features, 2) for features in first.cells]
    for features in (filters, 2 * filters, 4 * filters):
        if features > filters:
            placed.append(PlacedCell(genotype.reduction, features, 2))
        placed += [PlacedCell(genotype.normal, features, 1)] * repeats
    return placed


def _cells(
    placed: Sequence[PlacedCell], width: int, drop_path: float, norm: Normalization
) -> list[Layer]:
    """Return one layer for each cell, after a stem of that width."""
    layers, skip_features, skip_stride = [], None, 1
    for i, cell in enumerate(placed):
        description = layer(
            AmoebaCell,
            cell=cell.cell,
            features=cell.features,
            in_features=width,
            skip_features=skip_features,
            stride=cell.stride,
            skip_stride=skip_stride,
            drop_path=drop_path * (i + 1) / len(placed),
            norm=norm,
        )
        layers.append(description)
        width, skip_features, skip_stride = cell.width, width, cell.stride
    return layers


def _genotype(genotype: str | Genotype) -> Genotype:
    if isinstance(genotype, Genotype):
        return genotype
    if genotype not in GENOTYPES:
        raise ArgumentError(
            "genotype",
            f"`genotype` is {genotype!r}, but the published ones are {', '.join(GENOTYPES)}; "
            f"give one of these letters, or a Genotype",
        )
    return GENOTYPES[genotype]


def _stem(name: str, filters: int) -> StemShape:
    stems = {
        "imagenet": StemShape(32, 2, "VALID", (filters // 4, filters // 2)),
        "torchgpipe": StemShape(filters // 4, 2, "SAME", (filters // 2, filters)),
        "cifar": StemShape(3 * filters, 1, "SAME", ()),
    }
    if name not in stems:
        raise ArgumentError(
            "stem", f"`stem` is {name!r}, but the known stems are {', '.join(stems)}; use one"
        )
    least = {"imagenet": 8, "torchgpipe": 4, "cifar": 2}[name]
    if filters < least:
        raise ArgumentError(
            "filters",
            f"`filters` is {filters}, but the narrowest cell needs 2 features, which with the "
            f"stem {name!r} means {least} filters; give at least {least}",
        )
    return stems[name]


# --- checks ---------------------------------------------------------------------------------------


def _checked_sizes(
    image: int, first: StemShape, placed: Sequence[PlacedCell], head: int | None
) -> list[int]:
    """Return the sizes of all features; raise ValueError if the image is too small."""
    sizes = _sizes(image, first, placed)
    problem = _size_problem(sizes, placed, head)
    if problem:
        enough = image
        while _size_problem(_sizes(enough, first, placed), placed, head):
            enough += 1
        raise ArgumentError("image", f"`image` is {image}, but {problem}; give {enough} or more")
    return sizes


def _sizes(image: int, first: StemShape, placed: Sequence[PlacedCell]) -> list[int]:
    """Return the height and width of the features before each cell, and after the last."""
    room = image - 2 if first.padding == "VALID" else image
    sizes = [math.ceil(room / first.stride)]
    for cell in placed:
        sizes.append(math.ceil(sizes[-1] / cell.stride))
    return sizes


def _size_problem(sizes: Sequence[int], placed: Sequence[PlacedCell], head: int | None) -> str:
    """Say what these sizes are too small for; the empty string if nothing."""
    for i, (size, cell) in enumerate(zip(sizes, placed, strict=False), 1):
        if cell.stride > 1 and size < 2:
            return f"cell {i} of {len(placed)} halves its input, which would be {size}x{size}"
    if head is not None and sizes[head] < POOL:
        size = f"{sizes[head]}x{sizes[head]}"
        return f"the auxiliary head pools {POOL}x{POOL} of its input, which would be {size}"
    return ""
