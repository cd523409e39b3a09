"""Store one tree per layer of a whole network: one `Storage` for each chunk of the devices.

Letters: K devices, V chunks, k device, c chunk, s = c K + k stage.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.pipeline.ragged.geometry import Geometry
from gpipe_jax.pipeline.ragged.packing import Group
from gpipe_jax.pipeline.ragged.storage import Storage, from_block, to_block
from gpipe_jax.utils.trees import PyTree


class ChunkedStorage:
    """Describe the arrays [chunk 0, chunk 1, ...] that hold a tree of each layer.

    The trees are the layers' parameters, or their running statistics. Item c and the iterator give
    the `Storage` of each chunk.

    Args:
        geometry: Which layers belong to which chunk and device.
        trees: A tree of shapes for each layer of the network.
        only: The one stage to store, as if it had every device to itself; None stores all stages.
    """

    def __init__(
        self, geometry: Geometry, trees: Sequence[PyTree], *, only: int | None = None
    ) -> None:
        self.geometry = geometry
        self.stages = range(geometry.num_stages) if only is None else range(only, only + 1)
        runs = [
            [(run.count, run.scanned, trees[layers[run.start]]) for run in geometry.runs[s]]
            if s in self.stages
            else []
            for s, layers in enumerate(geometry.layer_ranges)
        ]
        K = geometry.num_devices
        self._chunks = [Storage(runs[c * K : (c + 1) * K]) for c in range(geometry.chunks)]

    def __getitem__(self, c: int) -> Storage:
        return self._chunks[c]

    def __iter__(self) -> Iterator[Storage]:
        return iter(self._chunks)

    def groups(self, s: int) -> tuple[Group, ...]:
        """Return where the leaves of stage s are, run by run."""
        c, k = self.geometry.at(s)
        return self[c].groups[k]

    def local_shapes(self) -> list[dict]:
        """Return the shapes of one device's arrays, chunk by chunk."""
        return [storage.local_shapes() for storage in self]

    def device_bytes(self) -> int:
        """Return the bytes that every device holds, padding included."""
        return sum(storage.device_bytes() for storage in self)

    def build(self, s: int, ids: jax.Array, make: Callable[[LayerShape, Any], PyTree]) -> dict:
        """Return one device's arrays for stage s, traced.

        Args:
            s: The stage.
            ids: Global ids of the device's layers, [V, longest stage].
            make: Function (shape, layer id) -> tree; called once for each run that is a scan.
        """
        c, k = self.geometry.at(s)
        trees = []
        for run in self.geometry.runs[s]:
            shape = self.geometry.run_shape(s, run)
            run_ids = ids[c, run.start : run.start + run.count]
            if run.scanned:
                trees.append(lax.map(lambda i, shape=shape: make(shape, i), run_ids))
            else:
                trees.append([make(shape, i) for i in run_ids])
        return self[c].write(k, trees)

    def split_block(self, k: int, block: Sequence[dict]) -> dict[int, PyTree]:
        """Return a tree for each of device k's layers by global id, from its block in numpy."""
        layers = [
            tree
            for storage, arrays in zip(self, block, strict=True)
            for tree in storage.split_layers(k, from_block(arrays))
        ]
        return dict(zip(self.geometry.layers_of_device(k), layers, strict=True))

    def join_block(self, k: int, layer: Callable[[int], PyTree]) -> list[dict]:
        """Invert `split_block`: return device k's block from `layer(i)` for each of its layers."""
        ranges = self.geometry.ranges_of_device(k)
        return [
            to_block(storage.join_layers(k, [jax.tree.map(np.asarray, layer(i)) for i in layers]))
            for storage, layers in zip(self, ranges, strict=True)
        ]
