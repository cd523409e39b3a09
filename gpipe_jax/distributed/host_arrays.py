"""Copy arrays between the devices and host memory, one row of the mesh at a time.

A host copies only what its own devices hold. So no host ever holds all of a network that is spread
over several hosts. Row k of the mesh has the devices at position k of the stage axis, one for each
replica; they hold equal blocks:

    mesh.devices        replica 0   replica 1
    row 0               block 0     block 0       an array [K * n, ...] has
    row 1               block 1     block 1       K blocks [n, ...]
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from gpipe_jax.distributed.mesh import batch_sharding, params_sharding, replicated_sharding
from gpipe_jax.utils.trees import PyTree

AnyMesh = Any  # a mesh with devices, not an abstract one


def local_rows(mesh: AnyMesh) -> list[int]:
    """Return the rows with a device of this process."""
    return [k for k, row in enumerate(mesh.devices) if _local(row)]


def owned_rows(mesh: AnyMesh) -> list[int]:
    """Return the rows that this process saves: each row has one owner, of alternating replicas."""
    replicas = mesh.devices.shape[1]
    return [k for k, row in enumerate(mesh.devices) if _local([row[k % replicas]])]


def start_copies(tree: PyTree) -> None:
    """Start to copy the arrays' blocks on this process's devices to the host, asynchronously."""
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            shard.data.copy_to_host_async()


def take(mesh: AnyMesh, tree: PyTree, k: int) -> PyTree:
    """Return copies of row k's blocks of arrays that are divided along axis 0 over the rows."""
    row = set(mesh.devices[k])

    def block(array: jax.Array) -> np.ndarray:
        shard = next(s for s in array.addressable_shards if s.device in row)
        # A view of a CPU device's buffer would see what a later step writes into it.
        return np.array(shard.data)

    return jax.tree.map(block, tree)


def place(mesh: AnyMesh, make: Callable[[int], PyTree]) -> PyTree:
    """Build arrays over all devices from `make(k)`, the blocks of row k, for each local row."""
    sharding = params_sharding(mesh)
    blocks, treedef = [], None
    for k in local_rows(mesh):
        leaves, treedef = jax.tree.flatten(make(k))
        devices = _local(mesh.devices[k])
        blocks.append([[jax.device_put(leaf, device) for device in devices] for leaf in leaves])
    if treedef is None:
        raise ValueError(
            f"no device of the mesh of {mesh.devices.size} is in process {jax.process_index()}; "
            f"use devices of all processes"
        )

    def join(rows: list[list[jax.Array]]) -> jax.Array:
        arrays = [array for row in rows for array in row]
        shape = arrays[0].shape
        whole = (mesh.devices.shape[0] * shape[0], *shape[1:])
        return jax.make_array_from_single_device_arrays(whole, sharding, arrays)

    return treedef.unflatten([join(list(rows)) for rows in zip(*blocks, strict=True)])


def replicate(mesh: AnyMesh, value: Any) -> Any:
    """Copy `value`, which every process has, to every device."""
    value = np.asarray(value)
    sharding = replicated_sharding(mesh)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def local_replicas(mesh: AnyMesh) -> list[int]:
    """Return the replicas with a device of this process."""
    return [d for d, column in enumerate(mesh.devices.T) if _local(column)]


def _local(devices: Iterable[Any]) -> list[Any]:
    process = jax.process_index()
    return [device for device in devices if device.process_index == process]


def place_batch(mesh: AnyMesh, micro_batched: PyTree, replicas: list[int]) -> PyTree:
    """Build arrays [M, D*B, ...] over the replicas from the examples of this process's replicas.

    Args:
        mesh: The devices.
        micro_batched: Arrays [M, len(replicas) * B, ...].
        replicas: The replicas with a device of this process, see `local_replicas`.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(micro_batched, sharding)

    def place_array(array: np.ndarray) -> jax.Array:
        size = array.shape[1] // len(replicas)

        def of_replica(index: Any) -> np.ndarray:
            replica = (index[1].start or 0) // size
            start = replicas.index(replica) * size
            return array[:, start : start + size]

        whole = (array.shape[0], mesh.devices.shape[1] * size, *array.shape[2:])
        return jax.make_array_from_callback(whole, sharding, of_replica)

    return jax.tree.map(place_array, micro_batched)
