"""Between arrays over all devices and one stage's block of them in numpy, a stage at a time.

A host copies only what its own devices hold, so none ever holds the whole of a network that is
spread over several. Rows of the mesh are stages; the devices of a row hold equal blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpipe_jax.distributed.mesh import batch_sharding, params_sharding, replicated_sharding
from gpipe_jax.utils.trees import PyTree

AnyMesh = Any  # with devices: one that is abstract has no blocks


def held(mesh: AnyMesh) -> list[int]:
    """The rows with a device of this process."""
    here = jax.process_index()
    rows = enumerate(mesh.devices)
    return [k for k, row in rows if any(device.process_index == here for device in row)]


def owned(mesh: AnyMesh) -> list[int]:
    """The rows that this process saves: each has one owner, and replicas take turns."""
    here, replicas = jax.process_index(), mesh.devices.shape[1]
    rows = enumerate(mesh.devices)
    return [k for k, row in rows if row[k % replicas].process_index == here]


def start_copies(tree: PyTree) -> None:
    """Let the arrays' blocks on this process's devices be copied to the host meanwhile."""
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            shard.data.copy_to_host_async()


def take(mesh: AnyMesh, tree: PyTree, k: int) -> PyTree:
    """The block of row k of arrays cut along their first axis over the rows, as copies."""
    row = set(mesh.devices[k])

    def block(array: jax.Array) -> np.ndarray:
        shard = next(s for s in array.addressable_shards if s.device in row)
        # A view of a CPU device's buffer would see what a later step writes into it.
        return np.array(shard.data)

    return jax.tree.map(block, tree)


def place(mesh: AnyMesh, make: Callable[[int], PyTree]) -> PyTree:
    """Arrays over all devices, of `make(k)`, the block of row k, for each row held here."""
    here, places = jax.process_index(), params_sharding(mesh)
    blocks, treedef = [], None
    for k in held(mesh):
        leaves, treedef = jax.tree.flatten(make(k))
        row = [device for device in mesh.devices[k] if device.process_index == here]
        blocks.append([[jax.device_put(leaf, device) for device in row] for leaf in leaves])
    if treedef is None:
        raise ValueError(
            f"no device of the mesh of {mesh.devices.size} is in process {here}; use all processes"
        )

    def join(parts: list[list[jax.Array]]) -> jax.Array:
        arrays = [array for part in parts for array in part]
        shape = arrays[0].shape
        whole = (mesh.devices.shape[0] * shape[0], *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, places, arrays)

    return treedef.unflatten([join(list(parts)) for parts in zip(*blocks, strict=True)])


def replicate(mesh: AnyMesh, value: Any) -> Any:
    """`value`, which every process has, on every device."""
    value = np.asarray(value)
    places = replicated_sharding(mesh)
    return jax.make_array_from_callback(value.shape, places, lambda index: value[index])


def columns(mesh: AnyMesh) -> list[int]:
    """The replicas with a device of this process."""
    here, replicas = jax.process_index(), enumerate(mesh.devices.T)
    return [d for d, column in replicas if any(one.process_index == here for one in column)]


def place_batch(mesh: AnyMesh, parts: PyTree, replicas: list[int]) -> PyTree:
    """Arrays [M, D*B, ...] over the replicas, of this process's part, [M, B of each of them, ...].

    Which is all of it where this process has a device of every replica.
    """
    places = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(parts, places)

    def one(array: np.ndarray) -> jax.Array:
        size = array.shape[1] // len(replicas)

        def part(index: Any) -> np.ndarray:
            first = (index[1].start or 0) // size
            start = replicas.index(first) * size
            return array[:, start : start + size]

        whole = (array.shape[0], mesh.devices.shape[1] * size, *array.shape[2:])
        return jax.make_array_from_callback(whole, places, part)

    return jax.tree.map(one, parts)
