"""Convert between arrays on devices and one tree per layer in numpy.

The trees are the same for any number of devices and chunks. Rows are those of the mesh: the devices
of row k hold equal arrays. No host copies more than the rows that it works on.
"""

from collections.abc import Callable, Mapping, Sequence

import jax

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.host_arrays import AnyMesh
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.utils.trees import PyTree


def split(
    mesh: AnyMesh,
    rows: Sequence[int],
    storages: Mapping[str, ChunkedStorage],
    arrays: Mapping[str, PyTree],
) -> dict[int, dict[str, PyTree]]:
    """Copy the named arrays of these rows: return a tree per name for each of their layers."""
    layers: dict[int, dict[str, PyTree]] = {}
    for k in rows:
        for name, tree in arrays.items():
            block = host_arrays.take(mesh, tree, k)
            for i, layer in storages[name].split_block(k, block).items():
                layers.setdefault(i, {})[name] = layer
    return layers


def join(
    mesh: AnyMesh,
    storages: Mapping[str, ChunkedStorage],
    layer: Callable[[int], Mapping[str, PyTree]],
    local_shapes: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    """Invert `split`: place the named arrays on the devices of this process.

    `layer(i)` gives the trees of layer i. It is called once, and only for the layers of these
    devices. `local_shapes` are the shapes and types of one device's arrays.
    """

    def block(k: int) -> dict[str, PyTree]:
        geometry = next(iter(storages.values())).geometry
        own = {i: layer(i) for i in geometry.layers_of_device(k)}
        joined = {
            name: storage.join_block(k, lambda i, name=name: own[i][name])
            for name, storage in storages.items()
        }
        # A stage without a parameter of some type does not know the optimizer's type for it.
        return jax.tree.map(lambda a, s: a.astype(s.dtype, copy=False), joined, dict(local_shapes))

    return host_arrays.place(mesh, block)
