"""Present packed arrays as the layers' tree of parameters, with each array in one leaf's place.

The layers' parameters are divided into groups, whose members an optimizer treats alike. An array of
the pipeline may hold leaves of several groups. For each of them, the array stands in the place of
the first leaf of the group that it holds, with zeros for the other groups. All other leaves are
empty, so that a norm of the tree counts each element once.

For a kernel and a bias that are in one pack, and a mask that leaves out the bias:

    layers' tree    kernel [2, 3]            bias [3]
    pack            k k k k k k b b b
    presented       k k k k k k 0 0 0        0 0 0 0 0 0 b b b

Nothing moves: the compiler fuses the zeros and the choice of the result with the optimizer.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.distributed.mesh import PARAMS_SPEC, MeshLike, device_index, num_devices
from gpipe_jax.pipeline import spmd
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.packing import LeafPlace
from gpipe_jax.utils.trees import PyTree

Ids = dict[int, jax.Array]  # the group of every element, by the number of the array


@dataclasses.dataclass(frozen=True)
class Home:
    """Say where a parameter of a layer is stored."""

    device: int
    row: int  # of the layer in its run
    array: int  # number of the array that holds it
    place: LeafPlace

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """Return the shape of the parameter; [1] for a scalar."""
        return jax.ShapeDtypeStruct(self.place.shape or (1,), self.place.dtype)

    @property
    def start(self) -> int:
        """Return the number of its first element in the pack."""
        return self.place.offset + self.row * self.place.size


def homes(storage: ChunkedStorage) -> list[PyTree]:
    """Return where each parameter of each layer is stored, as one tree per layer."""
    structure = jax.tree.structure(storage.local_shapes())
    numbers = structure.unflatten(range(structure.num_leaves))
    trees: dict[int, PyTree] = {}
    geometry = storage.geometry
    for s in storage.stages:
        c, k = geometry.at(s)
        dtypes = [spec.dtype for spec in storage[c].packs]
        for run, group in zip(geometry.runs[s], storage.groups(s), strict=True):
            arrays = [
                numbers[c]["packs"][dtypes.index(place.dtype)]
                if place.slot is None
                else numbers[c]["slots"][place.slot]
                for place in group.places
            ]
            for row in range(run.count):
                own = [Home(k, row, a, p) for a, p in zip(arrays, group.places, strict=True)]
                layer = geometry.layer_ranges[s][run.start + row]
                trees[layer] = group.treedef.unflatten(own)
    return [trees[i] for i in sorted(trees)]


def layers_tree(storage: ChunkedStorage) -> list[PyTree]:
    """Return the shapes of the parameters of each layer; those of scalars are [1]."""
    return jax.tree.map(lambda home: home.spec, homes(storage))


class _Part(NamedTuple):
    """Name what an array holds of a group."""

    group: int
    array: int


class LogicalTree:
    """Present the arrays of a storage as the layers' tree of parameters.

    Args:
        storage: How the parameters are stored.
        mesh: The devices.
        groups: The group of each parameter, in the order of the layers' trees.
    """

    def __init__(self, storage: ChunkedStorage, mesh: MeshLike, groups: Sequence[int]) -> None:
        self._mesh, self._groups = mesh, groups
        self._local = storage.local_shapes()
        self._structure = jax.tree.structure(self._local)
        self._homes, self._tree = jax.tree.flatten(homes(storage))
        kinds = [{kind: [kind] * len(a) for kind, a in arrays.items()} for arrays in self._local]
        self._kinds = jax.tree.leaves(kinds)  # of the arrays: "packs" or "slots"
        first: dict[_Part, int] = {}
        for i, home in enumerate(self._homes):
            first.setdefault(_Part(groups[i], home.array), i)
        self._part = {i: part for part, i in first.items()}  # of the leaves that are not empty
        holds = collections.Counter(part.array for part in first)
        self._shared = [a for a, count in holds.items() if count > 1]
        self._id_type = np.min_scalar_type(max(groups, default=0))

    @property
    def standing(self) -> list[int]:
        """Return the leaves that are not empty."""
        return list(self._part)

    # --- both ways -------------------------------------------------------------------------------

    def present(self, arrays: PyTree, ids: Ids) -> PyTree:
        """Return the layers' tree of arrays in the form of the parameters.

        Args:
            arrays: Arrays in the form of the parameters, of all devices or of one.
            ids: The group of every element; see `ids`.
        """
        flat = jax.tree.leaves(arrays)
        return self._tree.unflatten([self.leaf(i, flat, ids) for i in range(len(self._homes))])

    def leaf(self, i: int, arrays: Sequence[Any], ids: Ids) -> jax.Array:
        """Return leaf i of the layers' tree of a flat list of arrays."""
        spec = self._homes[i].spec
        if i not in self._part:
            dtype = arrays[self._homes[i].array].dtype
            return jnp.zeros((0, *spec.shape[1:]), dtype)
        group, a = self._part[i]
        own = arrays[a]
        if a in ids:
            own = jnp.where(ids[a] == group, own, jnp.zeros_like(own))
        return own.reshape(_shape_of_rank(own.shape, len(spec.shape)))

    def collect(self, leaves: Mapping[int, jax.Array], ids: Ids, like: Sequence[Any]) -> PyTree:
        """Invert `present`.

        Args:
            leaves: Leaves by number; those of a group may be missing, and count as zero.
            ids: The group of every element; see `ids`.
            like: The shapes and types of the arrays, as a flat list.
        """
        arrays = [jnp.zeros(spec.shape, spec.dtype) for spec in like]
        for i, (group, a) in self._part.items():
            if i in leaves:
                own = leaves[i].reshape(arrays[a].shape)
                arrays[a] = jnp.where(ids[a] == group, own, arrays[a]) if a in ids else own
        return self._structure.unflatten(arrays)

    # --- the groups of elements ------------------------------------------------------------------

    def ids(self, arrays: PyTree) -> Ids:
        """Return the group of every element of the arrays that hold leaves of several; traced.

        The ids of padding are any. If `arrays`, in the form of the parameters, are those of one
        device, so are the ids.
        """
        shapes = [a.shape for a in jax.tree.leaves(arrays)]
        if shapes == [a.shape for a in jax.tree.leaves(self._local)]:
            return self._ids(0)

        def block(k: int) -> Ids:
            is_slot = {a: self._kinds[a] == "slots" for a in self._shared}
            return {a: x[None] if is_slot[a] else x for a, x in self._ids(k).items()}

        def body() -> Ids:
            devices = range(num_devices(self._mesh))
            return lax.switch(device_index(), [functools.partial(block, k) for k in devices])

        return spmd.on_every_device(body, self._mesh, (), PARAMS_SPEC)()

    def _ids(self, device: int) -> Ids:
        held: dict[int, list[tuple[int, Home]]] = {a: [] for a in self._shared}
        for group, home in zip(self._groups, self._homes, strict=True):
            if home.device == device and home.array in held:
                held[home.array].append((group, home))
        specs = jax.tree.leaves(self._local)
        return {a: _ids(specs[a], own, self._id_type) for a, own in held.items()}


def _ids(spec: Any, held: Sequence[tuple[int, Home]], dtype: Any) -> jax.Array:
    """Return the ids of one array on a device, from the groups of the leaves that it holds."""
    if held and held[0][1].place.slot is not None:
        rows = np.zeros(spec.shape[0], dtype)
        for group, home in held:
            rows[home.row] = group
        return jnp.broadcast_to(rows.reshape(-1, *(1 for _ in spec.shape[1:])), spec.shape)
    pieces = sorted((home.start, home.place.size, group) for group, home in held)
    padding = spec.size - sum(size for _, size, _ in pieces)
    parts = [jnp.full(size, group, dtype) for _, size, group in pieces]
    return jnp.concatenate([*parts, jnp.zeros(padding, dtype)]).reshape(spec.shape)


def _shape_of_rank(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return a shape of this rank: with the first axes of a slot as one, or more axes for a pack.

    The last axis of a pack stays the last, because a TPU stores the last two in tiles.
    """
    if len(shape) < rank:
        return (*(1 for _ in range(rank - len(shape))), *shape)
    merged = len(shape) - rank + 1
    return (math.prod(shape[:merged]), *shape[merged:])
