"""Trees of arrays that differ from stage to stage, as arrays that every device holds alike.

One SPMD program runs on every device, so every device holds arrays of the same shapes. Two kinds:

- a *slot* `[K, n, ...]` holds one leaf of a run of up to n equal layers, for every stage that has
  a leaf of that shape (the body of a Transformer: nothing wasted, no relayout);
- a *pack* `[K, P]` of each dtype holds the rest of a stage's leaves end to end, padded to the
  largest stage (convolution stages, an embedding or a head).

Letters: K stages, k stage, n layers in a run, P packed elements.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.wire import like, pack

PyTree = Any

# Slots may make what a device holds this much larger than packing everything would: they spare the
# copies that reading a matrix out of a pack costs on TPU.
SLOT_SLACK = 0.05


class Place(NamedTuple):
    """Where one leaf of a run of layers is kept."""

    shape: tuple[int, ...]  # of one layer's leaf
    dtype: np.dtype
    slot: int | None  # index of the slot, or None if packed
    offset: int  # of the first element within the pack


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
        return self.depth * int(np.prod(self.shape)) * self.dtype.itemsize


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
        packs = sum(p.shape[0] * p.dtype.itemsize for p in self.packs)
        return packs + sum(s.size for s in self.slots)

    def used(self, k: int) -> dict[str, list[int]]:
        """Indices of the slots and packs that stage k reads: nothing else gets a gradient there."""
        places = [place for group in self.groups[k] for place in group.places]
        dtypes = {p.dtype for p in places if p.slot is None}
        return {
            "slots": sorted({p.slot for p in places if p.slot is not None}),
            "packs": [i for i, p in enumerate(self.packs) if p.dtype in dtypes],
        }

    def read(self, k: int, arrays: dict) -> list[PyTree]:
        """For each run of stage k a list of its layers' trees; if scanned, one tree [n, ...]."""
        runs = []
        for group in self.groups[k]:
            rows = [self._rows(place, group.count, arrays) for place in group.places]
            if group.scanned:
                runs.append(jax.tree.unflatten(group.treedef, rows))
            else:
                each = [[a[i] for a in rows] for i in range(group.count)]
                runs.append([jax.tree.unflatten(group.treedef, leaves) for leaves in each])
        return runs

    def read_leaf(self, place: Place, arrays: dict) -> Any:
        """The leaf kept at `place`, of a single layer."""
        return self._rows(place, 1, arrays)[0]

    def _rows(self, place: Place, count: int, arrays: dict) -> Any:
        if place.slot is not None:
            return arrays["slots"][place.slot][:count]
        flat = arrays["packs"][self._pack(place)]
        size = count * int(np.prod(place.shape))
        return flat[place.offset : place.offset + size].reshape((count, *place.shape))

    def _pack(self, place: Place) -> int:
        return [spec.dtype for spec in self.packs].index(place.dtype)

    def add_leaf(self, place: Place, arrays: dict, value: jax.Array) -> dict:
        """`arrays` with `value` added to the leaf kept at `place`, of a single layer."""
        slots, packs = list(arrays["slots"]), list(arrays["packs"])
        if place.slot is not None:
            slots[place.slot] = slots[place.slot].at[0].add(value)
        else:
            i, end = self._pack(place), place.offset + value.size
            packs[i] = packs[i].at[place.offset : end].add(value.ravel())
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
    bytes_of = {name: int(np.prod(name[0])) * name[1].itemsize for name in depth}
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
                used[place.dtype] = offset + run.count * int(np.prod(place.shape))
            places.append(place._replace(slot=slot, offset=offset))
        placed.append(run._replace(places=tuple(places)))
    return tuple(placed), used
