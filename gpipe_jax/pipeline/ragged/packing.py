"""Choose where the leaves of unequal stages lie: in slots that all devices share, or in packs.

Every device holds arrays of the same shapes. Three stages, each with two equal layers of a kernel
[8, 8]; the first also has an embedding [20, 8], the last a head [8, 10]:

    device      0                   1                   2
    slot 0    | kernel 0        | | kernel 2        | | kernel 4        |   [2, 8, 8], no padding
              | kernel 1        | | kernel 3        | | kernel 5        |
    pack      | embedding       | | 0 0 0 0 0 0 0 0 | | head  | 0 0 0 0 |   [160], the largest stage

A slot holds one leaf of a run of equal layers. A pack holds the other leaves of one dtype end to
end, padded with zeros to the largest stage. See `storage` for reading and writing.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax.utils.trees import PyTree, path_name

# Slots may make what a device holds larger by this fraction than packing everything. They save the
# copies that reading a matrix out of a pack costs on TPU. A fifth is enough for Transformers, whose
# first and last stages have fewer blocks and an embedding or a head.
SLOT_SLACK = 0.2


class LeafPlace(NamedTuple):
    """Say where one leaf of a run of layers is stored."""

    shape: tuple[int, ...]  # of one layer's leaf
    dtype: np.dtype
    slot: int | None  # index of the slot; None if it is packed
    offset: int  # of the first element within the pack

    @property
    def size(self) -> int:
        """Return the number of elements of one layer's leaf."""
        return math.prod(self.shape)


def _is_place(node: Any) -> bool:
    return isinstance(node, LeafPlace)


class Group(NamedTuple):
    """Describe the trees of a run of equal layers."""

    count: int  # number of layers
    scanned: bool  # read as one tree of arrays [n, ...]; otherwise as n trees
    treedef: Any  # structure of one layer's tree
    places: tuple[LeafPlace, ...]  # of the leaves of one layer's tree

    @property
    def named_places(self) -> list[tuple[str, LeafPlace]]:
        """Return the places with the names of the leaves, as "linear.kernel"."""
        named = jax.tree.leaves_with_path(self.treedef.unflatten(self.places), is_leaf=_is_place)
        return [(path_name(path), place) for path, place in named]


class Slot(NamedTuple):
    """Give the shape of an array [depth, *shape] that every device holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    depth: int  # number of layers of the longest run in it

    @property
    def bytes(self) -> int:
        """Return the bytes on each device."""
        return self.depth * math.prod(self.shape) * self.dtype.itemsize


class _Name(NamedTuple):
    """Name a candidate for a slot: the j-th leaf of a shape and dtype within a stage."""

    shape: tuple[int, ...]
    dtype: np.dtype
    j: int

    @property
    def bytes(self) -> int:
        """Return the bytes of one layer's leaf."""
        return math.prod(self.shape) * self.dtype.itemsize


def choose_places(
    stages: Sequence[Sequence[tuple[int, bool, PyTree]]],
) -> tuple[list[Slot], list[jax.ShapeDtypeStruct], list[tuple[Group, ...]]]:
    """Choose the slots and the packs, and place every leaf.

    Packing everything is smallest. The largest candidates become slots first, as long as what a
    device holds grows by at most `SLOT_SLACK` in all.

    Args:
        stages: The runs of each stage, as `Storage` takes them.

    Returns:
        The slots, the packs, and the groups of each stage.
    """
    groups = [[_group(*run) for run in runs] for runs in stages]
    candidates = [_candidates(stage) for stage in groups]
    depth: dict[_Name, int] = {}
    for named in candidates:
        for name, count in named.values():
            depth[name] = max(depth.get(name, 0), count)
    chosen = _affordable(candidates, depth)
    slots = [Slot(name.shape, name.dtype, depth[name]) for name in chosen]
    index = {name: i for i, name in enumerate(chosen)}
    placed = [_place(stage, named, index) for stage, named in zip(groups, candidates, strict=True)]
    widths: dict[np.dtype, int] = {}
    for _, used in placed:
        for dtype, size in used.items():
            widths[dtype] = max(widths.get(dtype, 0), size)
    packs = [jax.ShapeDtypeStruct((widths[d],), d) for d in sorted(widths, key=str)]
    return slots, packs, [stage for stage, _ in placed]


def _group(count: int, scanned: bool, tree: PyTree) -> Group:
    """Return a run whose leaves are not yet placed (offset 0, no slot)."""
    leaves, treedef = jax.tree.flatten(tree)
    places = tuple(LeafPlace(tuple(a.shape), np.dtype(a.dtype), None, 0) for a in leaves)
    return Group(count, scanned, treedef, places)


def _candidates(stage: Sequence[Group]) -> dict[tuple[int, int], tuple[_Name, int]]:
    """Return (run, leaf) -> (name, number of layers) for all leaves of a stage."""
    last: dict[tuple, int] = {}
    named = {}
    for r, group in enumerate(stage):
        for i, place in enumerate(group.places):
            key = place.shape, place.dtype
            last[key] = last.get(key, -1) + 1
            named[r, i] = (_Name(*key, last[key]), group.count)
    return named


def _affordable(candidates: Sequence[dict], depth: dict[_Name, int]) -> list[_Name]:
    """Return the candidates that become slots, the largest first."""
    share = {name: np.zeros(len(candidates)) for name in depth}  # bytes in each stage
    for k, named in enumerate(candidates):
        for name, count in named.values():
            share[name][k] += count * name.bytes
    packed: dict[np.dtype, Any] = {}  # bytes of each stage's pack
    for name, bytes_K in share.items():
        packed[name.dtype] = packed.get(name.dtype, 0) + bytes_K
    limit = sum(p.max() for p in packed.values()) * (1 + SLOT_SLACK)
    slotted, chosen = 0.0, []
    for name in sorted(depth, key=lambda name: -depth[name] * name.bytes):
        smaller = {**packed, name.dtype: packed[name.dtype] - share[name]}
        size = slotted + depth[name] * name.bytes
        if size + sum(p.max() for p in smaller.values()) <= limit:
            chosen.append(name)
            slotted, packed = size, smaller
    return chosen


def _place(
    stage: Sequence[Group], named: dict, index: dict[_Name, int]
) -> tuple[tuple[Group, ...], dict[np.dtype, int]]:
    """Place the leaves of a stage; return them and the packed elements of each dtype."""
    used: dict[np.dtype, int] = {}
    placed = []
    for r, group in enumerate(stage):
        places = []
        for i, place in enumerate(group.places):
            slot = index.get(named[r, i][0])
            offset = 0
            if slot is None:
                offset = used.get(place.dtype, 0)
                used[place.dtype] = offset + group.count * place.size
            places.append(place._replace(slot=slot, offset=offset))
        placed.append(group._replace(places=tuple(places)))
    return tuple(placed), used
