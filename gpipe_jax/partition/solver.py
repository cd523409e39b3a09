"""Cut L layers into K contiguous, non-empty stages so that the slowest is as fast as possible.

The slowest stage sets the speed of the pipeline. Rules of thumb miss the best cut by up to 1.8
times, or leave a stage empty. So this is exact: dynamic programming over all cuts, in O(K L^2).

Letters: L layers, K stages. Segment matrices are [L, L]: entry [i, e] is for the stage made of
layers i..e, both included; i > e is not a stage and holds infinity.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.text import format_bytes

PerLayer = Sequence[float] | np.ndarray  # [L]
# Equal stages differ by rounding if their layers are summed in another order; they still tie.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Partition:
    """Hold the layers of each stage, and how even the cut is. Costs have the unit of the input.

    `bound` is a lower bound on the bottleneck of *any* cut of these layers into K stages: no stage
    is faster than its largest layer, and the slowest is no faster than the mean. It ignores
    transfers and memory, so the best cut may be above it.
    """

    boundaries: tuple[int, ...]  # first layer of stages 1..K-1, strictly increasing
    costs: tuple[float, ...]  # of each stage, with the transfer to the next one
    bound: float  # max(largest layer, total / K)
    layers: int  # L

    @property
    def layer_ranges(self) -> list[range]:
        """Return the layer indices of each stage."""
        ends = (*self.boundaries, self.layers)
        return [range(i, e) for i, e in zip((0, *self.boundaries), ends, strict=True)]

    @property
    def bottleneck(self) -> float:
        """Return the cost of the slowest stage."""
        return max(self.costs)

    @property
    def imbalance(self) -> float:
        """Return the cost of the slowest stage over the mean cost; 1 is even."""
        mean = math.fsum(self.costs) / len(self.costs)
        return self.bottleneck / mean if mean else 1.0


def partition(
    costs: PerLayer,
    stages: int,
    *,
    transfer: PerLayer | None = None,
    memory: PerLayer | None = None,
    memory_limit: float | None = None,
    padding: PerLayer | None = None,
    objective: Literal["bottleneck", "variance"] = "bottleneck",
    names: Sequence[str] | None = None,
) -> Partition:
    """Return the best cut of the layers, of all cuts that fit in the memory.

    A stage costs the sum of its layers' `costs`, plus `transfer[l]` (same unit) if it ends with
    layer l and is not the last. The sum of its `memory` (bytes) stays within `memory_limit` (bytes
    per device). "bottleneck" minimises, each among the best of the one before:

    1. the largest stage cost;
    2. the largest sum of `padding` (parameter bytes per layer), if given: every device holds arrays
       as large as those of the largest stage;
    3. the sum of squared stage costs. Without transfers the mean is fixed, and this is the GPipe
       paper's objective (section 2.2): the variance.

    "variance" minimises 3 alone. With transfers the sum of squares is K (variance + mean^2), so it
    prefers even stages and cheap transfers. Among equal cuts, the later stages get more layers.

    Raises ValueError if the input is malformed or nothing fits; it names layers by `names`.
    """
    if objective not in ("bottleneck", "variance"):
        raise ValueError(f"objective is {objective!r}: use 'bottleneck' or 'variance'")
    layers = _checked(stages, names, costs, transfer, memory, memory_limit, padding)
    segments_LL = _segment_sums(layers.costs) + layers.transfer
    if memory_limit is not None:
        _forbid(segments_LL, _segment_sums(layers.memory), memory_limit)
    best, _ = _best_cut(segments_LL, stages, np.maximum)
    if math.isinf(best):
        raise ArgumentError("memory_limit", _nothing_fits(layers, stages))
    if objective == "bottleneck":
        _forbid(segments_LL, segments_LL, best)
        if padding is not None:
            bytes_LL = np.where(np.isinf(segments_LL), np.inf, _segment_sums(layers.padding))
            _forbid(segments_LL, bytes_LL, _best_cut(bytes_LL, stages, np.maximum)[0])
    _, boundaries = _best_cut(np.square(segments_LL), stages, np.add)
    return _cut(layers, boundaries)


def explicit(
    boundaries: Sequence[int],
    costs: PerLayer,
    *,
    stages: int,
    transfer: PerLayer | None = None,
    memory: PerLayer | None = None,
    memory_limit: float | None = None,
    names: Sequence[str] | None = None,
) -> Partition:
    """Return the cut given by the first layers of stages 1..K-1, checked as `partition` does."""
    layers = _checked(stages, names, costs, transfer, memory, memory_limit)
    if len(boundaries) != stages - 1:
        raise ValueError(
            f"{stages} stages need {stages - 1} boundaries, got {len(boundaries)}: give the first "
            "layer of each stage but the first"
        )
    for boundary in boundaries:
        if not isinstance(boundary, (int, np.integer)):
            raise ValueError(f"boundary {boundary!r} is not an index of a layer: give integers")
    for before, after in itertools.pairwise((0, *boundaries)):
        if not 0 < after < len(costs):
            raise ValueError(
                f"boundary {after} is out of range: of {len(costs)} layers, stages after the "
                f"first can start at 1 to {len(costs) - 1}"
            )
        if before >= after:
            raise ValueError(
                f"boundaries must increase, got {before} then {after}: a stage would be empty"
            )
    _check_memory(layers, [0, *boundaries], [f"stage {k}" for k in range(stages)])
    return _cut(layers, boundaries)


class _Layers(NamedTuple):
    """Hold the checked input, each [L]; missing values are 0, and the missing limit is infinity."""

    costs: np.ndarray
    transfer: np.ndarray
    memory: np.ndarray
    memory_limit: float
    padding: np.ndarray


def _checked(
    stages: int,
    names: Sequence[str] | None,
    costs: PerLayer,
    transfer: PerLayer | None,
    memory: PerLayer | None,
    memory_limit: float | None,
    padding: PerLayer | None = None,
) -> _Layers:
    if stages < 1 or len(costs) < stages:
        raise ValueError(
            f"cannot cut {len(costs)} layers into {stages} stages, as each needs at least one "
            f"layer: use 1 to {len(costs)} stages, or split layers"
        )
    if names is not None and len(names) != len(costs):
        raise ValueError(f"{len(costs)} costs but {len(names)} names: give one per layer")
    if memory_limit is not None and (memory is None or not memory_limit > 0):
        raise ValueError(
            f"memory_limit is {memory_limit} bytes and memory is "
            f"{'missing' if memory is None else 'given'}: "
            "a limit must be above 0 and needs the memory of each layer"
        )
    labels = [f"layer {i}" + (f" ({names[i]})" if names else "") for i in range(len(costs))]
    layers = _Layers(
        _values("costs", costs, labels),
        _values("transfer", transfer, labels),
        _values("memory", memory, labels),
        math.inf if memory_limit is None else memory_limit,
        _values("padding", padding, labels),
    )
    layers.transfer[-1] = 0.0  # only the last stage ends here, and it sends nothing
    _check_memory(layers, range(len(costs)), labels)
    return layers


def _values(argument: str, values: PerLayer | None, labels: list[str]) -> np.ndarray:
    array = np.zeros(len(labels)) if values is None else np.array(values, float)
    if array.shape != (len(labels),):
        raise ValueError(f"{len(labels)} costs but {len(array)} {argument}: give one per layer")
    for label, value in zip(labels, array, strict=True):
        if not 0 <= value < math.inf:
            raise ValueError(f"{argument} of {label} is {value}: give a finite number of 0 or more")
    return array


def _check_memory(layers: _Layers, starts: Sequence[int], labels: Sequence[str]) -> None:
    """Raise ValueError if a group of layers, given by its first, is above the limit."""
    needed = np.add.reduceat(layers.memory, starts)
    largest = int(np.argmax(needed))
    if needed[largest] > layers.memory_limit:
        raise ArgumentError(
            "memory_limit",
            f"{labels[largest]} alone needs {format_bytes(needed[largest])}, above memory_limit "
            f"{format_bytes(layers.memory_limit)}: raise the limit, or shrink or split it",
        )


def _nothing_fits(layers: _Layers, stages: int) -> str:
    least, _ = _best_cut(_segment_sums(layers.memory), stages, np.maximum)
    enough, held = 1, 0.0
    for value in layers.memory:  # filling each stage up in turn takes the fewest
        held += value
        if held > layers.memory_limit:
            enough, held = enough + 1, value
    return (
        f"no cut into {stages} stages fits: the largest stage needs at least "
        f"{format_bytes(least)}, memory_limit is {format_bytes(layers.memory_limit)}: use {enough} "
        f"or more stages, or raise it"
    )


def _cut(layers: _Layers, boundaries: Sequence[int]) -> Partition:
    """Return the description of this cut, its costs summed without rounding on the way."""
    cuts = [int(boundary) for boundary in boundaries]
    sent = [*layers.transfer[np.array(cuts, int) - 1], 0.0]
    held = np.split(layers.costs, cuts)
    costs = tuple(math.fsum([*own, extra]) for own, extra in zip(held, sent, strict=True))
    bound = max(float(layers.costs.max()), math.fsum(layers.costs) / len(costs))
    return Partition(tuple(cuts), costs, bound, len(layers.costs))


def _segment_sums(values: np.ndarray) -> np.ndarray:
    """Return the sum [L, L] of every segment, each summed alone: no differences, no cancelling."""
    count = len(values)
    sums_LL = np.cumsum(np.triu(np.broadcast_to(values, (count, count))), axis=1)
    sums_LL[np.tril_indices(count, -1)] = np.inf
    return sums_LL


def _forbid(segments_LL: np.ndarray, measure_LL: np.ndarray, limit: float) -> None:
    """Rule out, in place, the segments measured above the limit."""
    segments_LL[measure_LL > limit * (1 + ROUNDING)] = np.inf


def _best_cut(values_LL: np.ndarray, stages: int, combine: np.ufunc) -> tuple[float, list[int]]:
    """Return the least combined value of K segments that cover all layers, and its boundaries.

    best[k, j], the least for the first j layers in k stages, is the minimum over the start i of
    the last stage of combine(best[k-1, i], values[i, j-1]). `combine` grows in both arguments.
    """
    count = len(values_LL)
    best = np.full((stages + 1, count + 1), np.inf)
    best[0, 0] = 0.0
    scratch_LL = np.empty_like(values_LL)
    for k in range(1, stages + 1):
        combine(best[k - 1, :-1, None], values_LL, out=scratch_LL)
        best[k, 1:] = scratch_LL.min(axis=0)
    if math.isinf(best[stages, count]):
        return math.inf, []
    starts, end = [], count
    for k in range(stages, 1, -1):
        end = int(np.argmin(combine(best[k - 1, :end], values_LL[:end, end - 1])))
        starts.append(end)
    return float(best[stages, count]), starts[::-1]
