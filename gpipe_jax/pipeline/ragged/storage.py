"""Store trees that differ between stages in arrays that have the same shapes on every device.

One SPMD program runs on every device, so every device holds arrays of the same shapes. There are
two kinds, between which `packing` chooses (see the drawing there):

- a *slot* `[K, n, ...]` holds one leaf of a run of up to n equal layers, for every stage that has
  a leaf of that shape. The body of a Transformer needs nothing else: no padding, no new layout.
- a *pack* `[K P]` of each dtype holds the rest of a stage's leaves end to end, padded to the
  largest stage. Convolution stages are packed.

Letters: K stages (of one chunk), k stage, r run of a stage, n layers of a run, i layer of a run,
P packed elements.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.pipeline.ragged.boundary import pack, zeros
from gpipe_jax.pipeline.ragged.packing import LeafPlace, choose_places
from gpipe_jax.utils.trees import PyTree

Chosen = Callable[[str, tuple[int, ...]], bool]  # (name as "linear.kernel", shape) -> whether


class Storage:
    """Describe the arrays {"slots": [...], "packs": [...]} that hold the trees of K stages.

    Args:
        stages: The runs of each stage, as (number of layers, whether they are scanned, tree of one
            layer's shapes).
    """

    def __init__(self, stages: Sequence[Sequence[tuple[int, bool, PyTree]]]) -> None:
        self.slots, self.packs, self.groups = choose_places(stages)

    def local_shapes(self) -> dict:
        """Return the shapes of one device's arrays."""
        slots = [jax.ShapeDtypeStruct((s.depth, *s.shape), s.dtype) for s in self.slots]
        return {"slots": slots, "packs": list(self.packs)}

    def device_bytes(self) -> int:
        """Return the bytes that every device holds, padding included."""
        packs = sum(p.size * p.dtype.itemsize for p in self.packs)
        return packs + sum(s.bytes for s in self.slots)

    # --- reading ---------------------------------------------------------------------------------

    def read(self, k: int, arrays: dict) -> list[PyTree]:
        """Return the runs of stage k: a list of trees each, or one tree [n, ...] if scanned."""
        runs = []
        for r, group in enumerate(self.groups[k]):
            rows = self.read_run(k, r, arrays)
            runs.append(rows if group.scanned else _unstack(rows, group.count))
        return runs

    def read_run(self, k: int, r: int, arrays: dict) -> PyTree:
        """Return the trees of all layers of run r of stage k, as one tree [n, ...]."""
        group = self.groups[k][r]
        rows = [self._rows(place, 0, group.count, arrays) for place in group.places]
        return group.treedef.unflatten(rows)

    def read_layer(self, k: int, r: int, i: Any, arrays: dict) -> PyTree:
        """Return the tree of layer i of run r of stage k; `i` may be traced."""
        group = self.groups[k][r]
        return group.treedef.unflatten([self._rows(p, i, 1, arrays)[0] for p in group.places])

    def read_leaf(self, place: LeafPlace, arrays: dict) -> Any:
        """Return the leaf at `place`, of a run of one layer."""
        return self._rows(place, 0, 1, arrays)[0]

    def packed(self, k: int, r: int) -> list[int]:
        """Return which leaves of run r of stage k are in a pack."""
        return [n for n, place in enumerate(self.groups[k][r].places) if place.slot is None]

    def _rows(self, place: LeafPlace, i: Any, count: int, arrays: dict) -> Any:
        """Return a leaf of `count` layers of a run, from layer i on: [count, ...]."""
        if place.slot is not None:
            return _slice(arrays["slots"][place.slot], i, count)
        flat, size = arrays["packs"][self._pack_index(place)], place.size
        return _slice(flat, place.offset + i * size, count * size).reshape(count, *place.shape)

    def _pack_index(self, place: LeafPlace) -> int:
        return [spec.dtype for spec in self.packs].index(place.dtype)

    # --- adding ----------------------------------------------------------------------------------

    def add(self, k: int, r: int, i: Any, arrays: dict, tree: PyTree) -> dict:
        """Add `tree` to layer i of run r, traced; or a tree [n, ...] to all layers if i is None.

        All else stays as it is, so that the compiler can add in place.
        """
        group = self.groups[k][r]
        rows = tree if i is None else jax.tree.map(lambda a: a[None], tree)
        for place, value in zip(group.places, group.treedef.flatten_up_to(rows), strict=True):
            arrays = self._add_rows(place, 0 if i is None else i, arrays, value)
        return arrays

    def add_leaf(self, place: LeafPlace, arrays: dict, value: jax.Array) -> dict:
        """Add `value` to the leaf at `place`, of a run of one layer; traced."""
        return self._add_rows(place, 0, arrays, value[None])

    def _add_rows(self, place: LeafPlace, i: Any, arrays: dict, value: jax.Array) -> dict:
        """Add `value` [m, ...] to a leaf of m layers of a run, from layer i on."""
        slots, packs = list(arrays["slots"]), list(arrays["packs"])
        if place.slot is not None:
            slots[place.slot] = _add_slice(slots[place.slot], i, value)
        else:
            n, start = self._pack_index(place), place.offset + i * place.size
            packs[n] = _add_slice(packs[n], start, value.reshape(-1))
        return {"slots": slots, "packs": packs}

    # --- writing ---------------------------------------------------------------------------------

    def write(self, k: int, runs: Sequence[PyTree], xp: Any = jnp) -> dict:
        """Invert `read`: return one device's arrays, zero where stage k has no leaf."""
        local = self.local_shapes()
        slots = [zeros(spec, xp) for spec in local["slots"]]
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

    def mask_slots(self, chosen: Chosen) -> list[bool | np.ndarray]:
        """Return for each slot whether its leaves are `chosen`.

        It is one bool, if that is the same in all stages that have a leaf there. Otherwise it is an
        array [K, 1, ...] that broadcasts to the slot.
        """
        of_stages: list[dict[int, bool]] = [{} for _ in self.slots]
        for k, groups in enumerate(self.groups):
            for name, place in (named for group in groups for named in group.named_places):
                if place.slot is not None:
                    of_stages[place.slot][k] = chosen(name, place.shape)
        K = len(self.groups)
        return [
            next(iter(of_stage.values()))
            if len(set(of_stage.values())) == 1
            else np.array([of_stage.get(k, False) for k in range(K)]).reshape(
                K, 1, *(1 for _ in slot.shape)
            )
            for slot, of_stage in zip(self.slots, of_stages, strict=True)
        ]

    def mask_packs(self, k: int, chosen: Chosen) -> list[jax.Array]:
        """Return for each of stage k's packs which elements belong to `chosen` leaves."""
        packed: dict = {spec.dtype: [] for spec in self.packs}
        for group in self.groups[k]:
            for name, place in group.named_places:
                if place.slot is None:
                    mask = jnp.full(group.count * place.size, chosen(name, place.shape))
                    packed[place.dtype].append(mask)
        specs = [jax.ShapeDtypeStruct(spec.shape, bool) for spec in self.packs]
        return [pack(packed[p.dtype], s, jnp) for p, s in zip(self.packs, specs, strict=True)]

    # --- layer by layer, in numpy ----------------------------------------------------------------

    def split_layers(self, k: int, arrays: dict) -> list[PyTree]:
        """Return stage k's trees, one for each of its layers."""
        layers = []
        for r, group in enumerate(self.groups[k]):
            layers += _unstack(self.read_run(k, r, arrays), group.count)
        return layers

    def join_layers(self, k: int, layers: Sequence[PyTree]) -> dict:
        """Invert `split_layers`."""
        runs, start = [], 0
        for group in self.groups[k]:
            run = list(layers[start : start + group.count])
            runs.append(jax.tree.map(lambda *a: np.stack(a), *run) if group.scanned else run)
            start += group.count
        return self.write(k, runs, np)


def from_block(arrays: dict) -> dict:
    """Return one device's arrays from its block of the arrays of all devices.

    Slots of all devices are [K, ...]. Packs of all devices lie end to end, [K P]. A TPU stores the
    last two axes of an array in tiles, in which [1, P] takes twice its size, and a change of shape
    within a step means a copy.
    """
    return {"slots": [a[0] for a in arrays["slots"]], "packs": arrays["packs"]}


def to_block(arrays: dict) -> dict:
    """Invert `from_block`."""
    return {"slots": [a[None] for a in arrays["slots"]], "packs": arrays["packs"]}


def of_all_devices(local: dict, devices: int) -> dict:
    """Return the shapes of the arrays of all devices together, from those of one device."""
    packs = [jax.ShapeDtypeStruct((devices * a.size,), a.dtype) for a in local["packs"]]
    slots = [jax.ShapeDtypeStruct((devices, *a.shape), a.dtype) for a in local["slots"]]
    return {"slots": slots, "packs": packs}


def _unstack(tree: PyTree, count: int) -> list[PyTree]:
    """Divide a tree of arrays [count, ...] into one tree for each row."""
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(count)]


def _slice(array: Any, start: Any, size: int) -> Any:
    """Return `size` entries from `start`, which may be traced; numpy arrays work too."""
    if isinstance(start, int):
        return array[start : start + size]
    return lax.dynamic_slice_in_dim(array, start, size)


def _add_slice(array: jax.Array, start: Any, value: jax.Array) -> jax.Array:
    """Add `value` to as many entries from `start` on."""
    entries = _slice(array, start, value.shape[0])
    return lax.dynamic_update_slice_in_dim(array, entries + value.astype(array.dtype), start, 0)
