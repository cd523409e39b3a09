"""Trees of arrays that differ from stage to stage, as arrays that every device holds alike.

One SPMD program runs on every device, so every device holds arrays of the same shapes. Two kinds:

- a *slot* `[K, n, ...]` holds one leaf of a run of up to n equal layers, for every stage that has
  a leaf of that shape (the body of a Transformer: nothing wasted, no relayout);
- a *pack* `[K P]` of each dtype holds the rest of a stage's leaves end to end, padded to the
  largest stage (convolution stages).

Letters: K stages, k stage, n layers in a run, P packed elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.wire import like, pack

PyTree = Any

# Slots may make what a device holds this much larger than packing everything would: they spare the
# copies that reading a matrix out of a pack costs on TPU. A fifth is enough for Transformers, whose
# first and last stages have fewer blocks and an embedding or a head.
SLOT_SLACK = 0.2


class Place(NamedTuple):
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
    places: tuple[Place, ...]


class Slot(NamedTuple):
    """Shape of an array [depth, *shape] that every device holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    depth: int

    @property
    def size(self) -> int:
        """Bytes on each device."""
        return self.depth * math.prod(self.shape) * self.dtype.itemsize


class Storage:
    """The rectangular form of K stages' trees: {"slots": [...], "packs": [...]}.

    `stages[k]` lists stage k's runs: the number of layers, whether they are scanned, and the tree
    of one (of shapes).
    """

    def __init__(self, stages: Sequence[Sequence[tuple[int, bool, PyTree]]]) -> None:
        groups = [[_group(*run) for run in runs] for runs in stages]
        self.slots, self.packs, self.groups = _choose_storage(groups)

    def local_shapes(self) -> dict:
        """One device's arrays, as shapes."""
        slots = [jax.ShapeDtypeStruct((s.depth, *s.shape), s.dtype) for s in self.slots]
        return {"slots": slots, "packs": [jax.ShapeDtypeStruct(*like(p)) for p in self.packs]}

    def device_bytes(self) -> int:
        """Bytes that every device holds, padding included."""
        packs = sum(p.size * p.dtype.itemsize for p in self.packs)
        return packs + sum(s.size for s in self.slots)

    def read(self, k: int, arrays: dict) -> list[PyTree]:
        """For each run of stage k a list of its layers' trees; if scanned, one tree [n, ...]."""
        runs = []
        for r, group in enumerate(self.groups[k]):
            rows = self.read_run(k, r, arrays)
            if not group.scanned:
                rows = [jax.tree.map(lambda a, i=i: a[i], rows) for i in range(group.count)]
            runs.append(rows)
        return runs

    def read_run(self, k: int, r: int, arrays: dict) -> PyTree:
        """The trees of all layers of run r of stage k, as one tree [n, ...]."""
        group = self.groups[k][r]
        rows = [self._rows(place, 0, group.count, arrays) for place in group.places]
        return group.treedef.unflatten(rows)

    def read_layer(self, k: int, r: int, i: Any, arrays: dict) -> PyTree:
        """The tree of layer i of run r of stage k; `i` may be traced."""
        group = self.groups[k][r]
        return group.treedef.unflatten([self._rows(p, i, 1, arrays)[0] for p in group.places])

    def packed(self, k: int, r: int) -> list[int]:
        """Which leaves of run r of stage k are in a pack."""
        return [n for n, place in enumerate(self.groups[k][r].places) if place.slot is None]

    def read_leaf(self, place: Place, arrays: dict) -> Any:
        """The leaf kept at `place`, of a single layer."""
        return self._rows(place, 0, 1, arrays)[0]

    def _rows(self, place: Place, i: Any, count: int, arrays: dict) -> Any:
        """A leaf of `count` layers of a run from layer i on, [count, ...]."""
        if place.slot is not None:
            return _part(arrays["slots"][place.slot], i, count)
        flat, size = arrays["packs"][self._pack(place)], place.size
        return _part(flat, place.offset + i * size, count * size).reshape(count, *place.shape)

    def _pack(self, place: Place) -> int:
        return [spec.dtype for spec in self.packs].index(place.dtype)

    def add(self, k: int, r: int, i: Any, arrays: dict, tree: PyTree) -> dict:
        """Traced: `arrays` with `tree` added to layer i of run r, or [n, ...] to all if i is None.

        Everything else stays as it is, so that the compiler can do it in place.
        """
        group = self.groups[k][r]
        rows = tree if i is None else jax.tree.map(lambda a: a[None], tree)
        for place, value in zip(group.places, group.treedef.flatten_up_to(rows), strict=True):
            arrays = self._add_rows(place, 0 if i is None else i, arrays, value)
        return arrays

    def add_leaf(self, place: Place, arrays: dict, value: jax.Array) -> dict:
        """Traced: `arrays` with `value` added to the leaf kept at `place`, of a single layer."""
        return self._add_rows(place, 0, arrays, value[None])

    def _add_rows(self, place: Place, i: Any, arrays: dict, value: jax.Array) -> dict:
        """Add to a leaf of some layers of a run from layer i on; `value` is [some, ...]."""
        slots, packs = list(arrays["slots"]), list(arrays["packs"])
        if place.slot is not None:
            slots[place.slot] = _add_part(slots[place.slot], i, value)
        else:
            n, start = self._pack(place), place.offset + i * place.size
            packs[n] = _add_part(packs[n], start, value.reshape(-1))
        return {"slots": slots, "packs": packs}

    def write(self, k: int, runs: Sequence[PyTree], xp: Any = jnp) -> dict:
        """The inverse of `read`: one device's arrays, zero where stage k has none."""
        local = self.local_shapes()
        slots = [xp.zeros(*like(s)) for s in local["slots"]]
        packed: dict = {spec.dtype: [] for spec in self.packs}
        for group, run in zip(self.groups[k], runs, strict=True):
            columns = [jax.tree.leaves(run)] if group.scanned else map(jax.tree.leaves, run)
            for place, *leaves in zip(group.places, *columns, strict=True):
                rows = leaves[0] if group.scanned else xp.stack(leaves)
                if place.slot is None:
                    packed[place.dtype].append(rows)
                else:
                    rest = slots[place.slot][group.count :]
                    slots[place.slot] = xp.concatenate([rows, rest])
        return {"slots": slots, "packs": [pack(packed[s.dtype], s, xp) for s in self.packs]}

    def mask_packs(self, k: int, chosen: Callable[[tuple[int, ...]], bool]) -> list[jax.Array]:
        """For each of stage k's packs, which of its elements are of leaves of `chosen` shapes."""
        packed: dict = {spec.dtype: [] for spec in self.packs}
        for group in self.groups[k]:
            for place in (place for place in group.places if place.slot is None):
                packed[place.dtype].append(jnp.full(group.count * place.size, chosen(place.shape)))
        specs = [jax.ShapeDtypeStruct(spec.shape, bool) for spec in self.packs]
        return [pack(packed[p.dtype], s, jnp) for p, s in zip(self.packs, specs, strict=True)]

    def split_layers(self, k: int, arrays: dict) -> list[PyTree]:
        """Stage k's trees, one for each of its layers."""
        layers = []
        for group, run in zip(self.groups[k], self.read(k, arrays), strict=True):
            if group.scanned:
                run = [jax.tree.map(lambda a, i=i: a[i], run) for i in range(group.count)]
            layers += run
        return layers

    def join_layers(self, k: int, layers: Sequence[PyTree]) -> dict:
        """The inverse of `split_layers`, in numpy."""
        runs, start = [], 0
        for group in self.groups[k]:
            some = list(layers[start : start + group.count])
            runs.append(jax.tree.map(lambda *a: np.stack(a), *some) if group.scanned else some)
            start += group.count
        return self.write(k, runs, np)


def from_block(arrays: dict) -> dict:
    """One device's arrays, from its block of those of all devices: slots are [K, ...] there.

    Packs of all devices lie end to end, [K P]: a TPU keeps the last two axes of an array in tiles,
    in which [1, P] takes twice its size, and changing the shape within a step means a copy.
    """
    return {"slots": [a[0] for a in arrays["slots"]], "packs": arrays["packs"]}


def to_block(arrays: dict) -> dict:
    """The inverse of `from_block`."""
    return {"slots": [a[None] for a in arrays["slots"]], "packs": arrays["packs"]}


def of_all_devices(local: dict, devices: int) -> dict:
    """The shapes of the arrays of all devices together, from those of one."""
    packs = [jax.ShapeDtypeStruct((devices * a.size,), a.dtype) for a in local["packs"]]
    slots = [jax.ShapeDtypeStruct((devices, *a.shape), a.dtype) for a in local["slots"]]
    return {"slots": slots, "packs": packs}


def _part(array: Any, start: Any, size: int) -> Any:
    """`size` entries from `start`, which may be traced; of numpy arrays too."""
    if isinstance(start, int):
        return array[start : start + size]
    return lax.dynamic_slice_in_dim(array, start, size)


def _add_part(array: jax.Array, start: Any, value: jax.Array) -> jax.Array:
    part = _part(array, start, value.shape[0])
    return lax.dynamic_update_slice_in_dim(array, part + value.astype(array.dtype), start, 0)


def _group(count: int, scanned: bool, tree: PyTree) -> Group:
    """A run whose leaves are not yet placed (offset 0, no slot)."""
    leaves, treedef = jax.tree.flatten(tree)
    places = tuple(Place(tuple(a.shape), np.dtype(a.dtype), None, 0) for a in leaves)
    return Group(count, scanned, treedef, places)


def _choose_storage(
    stages: list[list[Group]],
) -> tuple[list[Slot], list, list[tuple[Group, ...]]]:
    """Slots for what is alike, packs for the rest.

    The j-th leaf of a shape within a stage is a candidate for the j-th slot of that shape. Packing
    everything is smallest; the largest candidates become slots first, as long as what a device
    holds grows by no more than `SLOT_SLACK` in all.
    """
    names = [_candidates(runs) for runs in stages]
    depth: dict[tuple, int] = {}
    for candidates in names:
        for name, count in candidates.values():
            depth[name] = max(depth.get(name, 0), count)
    chosen = _affordable(names, depth)
    slots = [Slot(shape, dtype, depth[shape, dtype, j]) for shape, dtype, j in chosen]
    index = {name: i for i, name in enumerate(chosen)}
    placed = [
        _place(runs, candidates, index) for runs, candidates in zip(stages, names, strict=True)
    ]
    widths: dict = {}
    for _, used in placed:
        for dtype, size in used.items():
            widths[dtype] = max(widths.get(dtype, 0), size)
    packs = [jax.ShapeDtypeStruct((widths[d],), d) for d in sorted(widths, key=str)]
    return slots, packs, [runs for runs, _ in placed]


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
