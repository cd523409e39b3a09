"""Which leaves of unequal stages have a slot, and where in a pack the others lie; see `storage`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax.utils.trees import PyTree

# Slots may make what a device holds this much larger than packing everything would: they spare the
# copies that reading a matrix out of a pack costs on TPU. A fifth is enough for Transformers, whose
# first and last stages have fewer blocks and an embedding or a head.
SLOT_SLACK = 0.2


class LeafPlace(NamedTuple):
    """Where one leaf of a run of layers is kept."""

    shape: tuple[int, ...]  # of one layer's leaf
    dtype: np.dtype
    slot: int | None  # index of the slot, or None if packed
    offset: int  # of the first element within the pack

    @property
    def size(self) -> int:
        """Elements of one layer's leaf."""
        return math.prod(self.shape)


class Group(NamedTuple):
    """The trees of a run of equal layers."""

    count: int
    scanned: bool  # read as one tree of arrays [n, ...], else as n trees
    treedef: Any  # of one layer's tree
    places: tuple[LeafPlace, ...]


class Slot(NamedTuple):
    """Shape of an array [depth, *shape] that every device holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    depth: int

    @property
    def bytes(self) -> int:
        """On each device."""
        return self.depth * math.prod(self.shape) * self.dtype.itemsize


def choose_places(
    stages: Sequence[Sequence[tuple[int, bool, PyTree]]],
) -> tuple[list[Slot], list, list[tuple[Group, ...]]]:
    """Slots for what is alike, packs for the rest, and with them the stages' runs.

    `stages[k]` lists stage k's runs, as `Storage` takes them. The j-th leaf of a shape within a
    stage is a candidate for the j-th slot of that shape. Packing everything is smallest; the
    largest candidates become slots first, as long as what a device holds grows by no more than
    `SLOT_SLACK` in all.
    """
    groups = [[_group(*run) for run in runs] for runs in stages]
    names = [_candidates(runs) for runs in groups]
    depth: dict[tuple, int] = {}
    for candidates in names:
        for name, count in candidates.values():
            depth[name] = max(depth.get(name, 0), count)
    chosen = _affordable(names, depth)
    slots = [Slot(shape, dtype, depth[shape, dtype, j]) for shape, dtype, j in chosen]
    index = {name: i for i, name in enumerate(chosen)}
    placed = [
        _place(runs, candidates, index) for runs, candidates in zip(groups, names, strict=True)
    ]
    widths: dict = {}
    for _, used in placed:
        for dtype, size in used.items():
            widths[dtype] = max(widths.get(dtype, 0), size)
    packs = [jax.ShapeDtypeStruct((widths[d],), d) for d in sorted(widths, key=str)]
    return slots, packs, [runs for runs, _ in placed]


def _group(count: int, scanned: bool, tree: PyTree) -> Group:
    """A run whose leaves are not yet placed (offset 0, no slot)."""
    leaves, treedef = jax.tree.flatten(tree)
    places = tuple(LeafPlace(tuple(a.shape), np.dtype(a.dtype), None, 0) for a in leaves)
    return Group(count, scanned, treedef, places)


def _candidates(runs: list[Group]) -> dict:
    """(run, leaf) -> ((shape, dtype, j), number of layers)."""
    seen: dict = {}
    found = {}
    for r, run in enumerate(runs):
        for i, place in enumerate(run.places):
            j = seen[place.shape, place.dtype] = seen.get((place.shape, place.dtype), -1) + 1
            found[r, i] = ((place.shape, place.dtype, j), run.count)
    return found


def _affordable(names: list[dict], depth: dict) -> list[tuple]:
    """The candidates worth a slot, largest first."""
    bytes_of = {name: math.prod(name[0]) * name[1].itemsize for name in depth}
    packed: dict = {}  # dtype -> bytes of each stage's pack
    share = {name: np.zeros(len(names)) for name in depth}
    for k, candidates in enumerate(names):
        for name, count in candidates.values():
            share[name][k] += count * bytes_of[name]
    for name, bytes_K in share.items():
        packed[name[1]] = packed.get(name[1], 0) + bytes_K
    limit = sum(p.max() for p in packed.values()) * (1 + SLOT_SLACK)
    slotted, chosen = 0.0, []
    for name in sorted(depth, key=lambda n: -depth[n] * bytes_of[n]):
        smaller = {**packed, name[1]: packed[name[1]] - share[name]}
        size = slotted + depth[name] * bytes_of[name]
        if size + sum(p.max() for p in smaller.values()) <= limit:
            chosen.append(name)
            slotted, packed = size, smaller
    return chosen


def _place(runs: list[Group], candidates: dict, index: dict) -> tuple[tuple[Group, ...], dict]:
    """The runs with every leaf placed, and the packed elements they need of each dtype."""
    used: dict = {}
    placed = []
    for r, run in enumerate(runs):
        places = []
        for i, place in enumerate(run.places):
            slot = index.get(candidates[r, i][0])
            offset = 0
            if slot is None:
                offset = used.get(place.dtype, 0)
                used[place.dtype] = offset + run.count * place.size
            places.append(place._replace(slot=slot, offset=offset))
        placed.append(run._replace(places=tuple(places)))
    return tuple(placed), used
