"""Trees of arrays that differ from stage to stage, as arrays that every device holds alike.

One SPMD program runs on every device, so every device holds arrays of the same shapes. Two kinds:

- a *slot* `[K, n, ...]` holds one leaf of a run of up to n equal layers, for every stage that has
  a leaf of that shape (the body of a Transformer: nothing wasted, no relayout);
- a *pack* `[K P]` of each dtype holds the rest of a stage's leaves end to end, padded to the
  largest stage (convolution stages).

`packing` chooses between them.

Letters: K stages, k stage, n layers in a run, P packed elements.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.pipeline.ragged.boundary import like, pack
from gpipe_jax.pipeline.ragged.packing import LeafPlace, choose_places
from gpipe_jax.utils.trees import PyTree


class Storage:
    """The rectangular form of K stages' trees: {"slots": [...], "packs": [...]}.

    `stages[k]` lists stage k's runs: the number of layers, whether they are scanned, and the tree
    of one (of shapes).
    """

    def __init__(self, stages: Sequence[Sequence[tuple[int, bool, PyTree]]]) -> None:
        self.slots, self.packs, self.groups = choose_places(stages)

    def local_shapes(self) -> dict:
        """One device's arrays, as shapes."""
        slots = [jax.ShapeDtypeStruct((s.depth, *s.shape), s.dtype) for s in self.slots]
        return {"slots": slots, "packs": list(self.packs)}

    def device_bytes(self) -> int:
        """Bytes that every device holds, padding included."""
        packs = sum(p.size * p.dtype.itemsize for p in self.packs)
        return packs + sum(s.bytes for s in self.slots)

    def read(self, k: int, arrays: dict) -> list[PyTree]:
        """For each run of stage k a list of its layers' trees; if scanned, one tree [n, ...]."""
        runs = []
        for r, group in enumerate(self.groups[k]):
            rows = self.read_run(k, r, arrays)
            runs.append(rows if group.scanned else _unstacked(rows, group.count))
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

    def read_leaf(self, place: LeafPlace, arrays: dict) -> Any:
        """The leaf kept at `place`, of a single layer."""
        return self._rows(place, 0, 1, arrays)[0]

    def _rows(self, place: LeafPlace, i: Any, count: int, arrays: dict) -> Any:
        """A leaf of `count` layers of a run from layer i on, [count, ...]."""
        if place.slot is not None:
            return _part(arrays["slots"][place.slot], i, count)
        flat, size = arrays["packs"][self._pack(place)], place.size
        return _part(flat, place.offset + i * size, count * size).reshape(count, *place.shape)

    def _pack(self, place: LeafPlace) -> int:
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

    def add_leaf(self, place: LeafPlace, arrays: dict, value: jax.Array) -> dict:
        """Traced: `arrays` with `value` added to the leaf kept at `place`, of a single layer."""
        return self._add_rows(place, 0, arrays, value[None])

    def _add_rows(self, place: LeafPlace, i: Any, arrays: dict, value: jax.Array) -> dict:
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
        for r, group in enumerate(self.groups[k]):
            layers += _unstacked(self.read_run(k, r, arrays), group.count)
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


def _unstacked(tree: PyTree, count: int) -> list[PyTree]:
    """A tree of arrays [count, ...] as one tree of each row."""
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(count)]


def _part(array: Any, start: Any, size: int) -> Any:
    """`size` entries from `start`, which may be traced; of numpy arrays too."""
    if isinstance(start, int):
        return array[start : start + size]
    return lax.dynamic_slice_in_dim(array, start, size)


def _add_part(array: jax.Array, start: Any, value: jax.Array) -> jax.Array:
    part = _part(array, start, value.shape[0])
    return lax.dynamic_update_slice_in_dim(array, part + value.astype(array.dtype), start, 0)
