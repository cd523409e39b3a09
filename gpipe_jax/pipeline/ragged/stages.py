"""A network cut into stages: with `storage`, `packing` and `wire`, all that knows that they differ.

A device holds V chunks, each of them one of K V stages; chunks have arrays of their own. Stages of
a chunk with the same layers and the same input share one `kind`: one compiled body.

Letters: K devices, V chunks, k device, c chunk, s = c K + k stage.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.distributed.mesh import STAGE
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.pipeline.ragged.boundary import BoundaryFormat
from gpipe_jax.pipeline.ragged.packing import LeafPlace
from gpipe_jax.pipeline.ragged.storage import Storage, from_block, to_block
from gpipe_jax.utils.trees import PyTree, same_shapes, signature, tree_bytes

# Longer runs of equal layers are a `lax.scan`. Shorter ones are unrolled: a scan stacks what its
# backward pass keeps, which cost 1.3 times the time on CPU and 1.25 times the memory on TPU v5p,
# while unrolling five layers a stage took 3.7 times as long to compile. With `remat_layers` there
# is little to keep, and every run of equal layers is a scan.
MAX_UNROLL = 8


class Run(NamedTuple):
    """Equal layers that follow each other within a stage."""

    layer: Layer
    start: int  # position in the stage
    count: int
    scanned: bool  # whether the layers are one `lax.scan`


class Owner(NamedTuple):
    """Where a tied parameter is kept."""

    stage: int
    place: LeafPlace


class Stages:
    """A network cut into stages, with the rectangular form of its parameters and boundaries.

    `cuts[s]` are the layers of stage s; there are `chunks` times as many stages as devices. The
    form of parameters, `[chunk 0, chunk 1, ...]`, is that of `Storage` for each chunk; of running
    statistics likewise.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        layer_ranges: Sequence[range],
        *,
        chunks: int = 1,
        remat_layers: bool = False,
    ) -> None:
        self.shapes, self.layer_ranges, self.chunks = shapes, layer_ranges, chunks
        self.remat_layers = remat_layers
        self.num_devices = len(layer_ranges) // chunks
        self.boundary_format = BoundaryFormat([shapes[cut[0]].boundary for cut in layer_ranges[1:]])
        longest = 1 if remat_layers else MAX_UNROLL
        self.runs = [_find_runs(shapes, cut, longest) for cut in layer_ranges]
        self.params = self._store(lambda shape: shape.params)
        self.stats = self._store(lambda shape: shape.stats)
        self.owners = self._find_owners()
        names: dict = {}
        self.kind = [names.setdefault(self._signature(s), s) for s in range(len(layer_ranges))]

    def _store(self, tree: Callable[[LayerShape], PyTree]) -> list[Storage]:
        stages = [
            [(run.count, run.scanned, tree(self.shapes[cut[run.start]])) for run in runs]
            for runs, cut in zip(self.runs, self.layer_ranges, strict=True)
        ]
        K = self.num_devices
        return [Storage(stages[c * K : (c + 1) * K]) for c in range(self.chunks)]

    @property
    def last(self) -> int:
        """The last stage, K V - 1."""
        return len(self.layer_ranges) - 1

    def at(self, s: int) -> tuple[int, int]:
        """(chunk, device) of stage s."""
        return divmod(s, self.num_devices)

    def input(self, s: int) -> Boundary:
        """What stage s gets, as shapes."""
        return self.shapes[self.layer_ranges[s][0]].boundary

    def passing(self, s: int) -> set[str]:
        """Names of the skips that cross stage s, which does nothing but hand them on."""
        popped = {name for run in self.runs[s] for name in run.layer.pops}
        return set(self.input(s).skips) - popped

    def _signature(self, s: int) -> tuple:
        """Stages with equal signatures run the same code: same layers, same place at the ends."""
        (c, k), ends = self.at(s), (s == 0, s == self.last)
        layers = tuple((run.layer, run.count) for run in self.runs[s])
        groups = (*self.params[c].groups[k], *self.stats[c].groups[k])
        places = tuple(group.places for group in groups)
        return c, ends, signature(self.input(s)), layers, places

    def layer_ids(self) -> np.ndarray:
        """int32 [K, V, longest stage]: the global ids of each stage's layers, padded with zeros."""
        ids = np.zeros((self.num_devices, self.chunks, max(map(len, self.layer_ranges))), np.int32)
        for s, cut in enumerate(self.layer_ranges):
            c, k = self.at(s)
            ids[k, c, : len(cut)] = cut
        return ids

    # --- parameters -------------------------------------------------------------------------------

    def build(
        self,
        storages: Sequence[Storage],
        s: int,
        ids: jax.Array,
        make: Callable[[LayerShape, Any], PyTree],
    ) -> dict:
        """One device's arrays for stage s from `make(shape, layer id)`, called once for each run.

        `ids` [V, longest stage] are the layers' global ids; `storages` is `params` or `stats`.
        """
        c, k = self.at(s)
        trees = []
        for run in self.runs[s]:
            shape = self.shapes[self.layer_ranges[s][run.start]]
            one = lambda i, shape=shape: make(shape, i)  # noqa: E731
            each = ids[c, run.start : run.start + run.count]
            trees.append(lax.map(one, each) if run.scanned else [one(i) for i in each])
        return storages[c].write(k, trees)

    def layers_of(self, k: int) -> list[int]:
        """Global ids of device k's layers, in all its chunks."""
        return [i for cut in self.layer_ranges[k :: self.num_devices] for i in cut]

    def split_block(self, storages: Sequence[Storage], k: int, block: list) -> dict[int, PyTree]:
        """Device k's arrays, in numpy, as one tree for each of its layers, by global id."""
        layers = [
            tree
            for storage, arrays in zip(storages, block, strict=True)
            for tree in storage.split_layers(k, from_block(arrays))
        ]
        return dict(zip(self.layers_of(k), layers, strict=True))

    def join_block(
        self, storages: Sequence[Storage], k: int, layer: Callable[[int], PyTree]
    ) -> list[dict]:
        """The inverse of `split_block`, of `layer(i)` for each of device k's layers."""
        cuts = self.layer_ranges[k :: self.num_devices]
        return [
            to_block(storage.join_layers(k, [jax.tree.map(np.asarray, layer(i)) for i in cut]))
            for storage, cut in zip(storages, cuts, strict=True)
        ]

    # --- tied parameters --------------------------------------------------------------------------

    def _find_owners(self) -> dict[str, Owner]:
        """Tied name -> where the parameter is kept: with the first layer that has it."""
        owners = {}
        for s, runs in enumerate(self.runs):
            c, k = self.at(s)
            for run, group in zip(runs, self.params[c].groups[k], strict=True):
                if run.layer.ties:
                    places = jax.tree.unflatten(group.treedef, group.places)
                    found = skips_and_ties.offered(run.layer, places)
                    owners.update({name: Owner(s, place) for name, place in found.items()})
        return owners

    def gather_shared(self, params: list) -> dict[str, jax.Array]:
        """Traced, on every device: the tied parameters, from the devices that keep them."""

        def one(owner: Owner) -> jax.Array:
            c, k = self.at(owner.stage)
            value = self.params[c].read_leaf(owner.place, params[c])
            here = lax.axis_index(STAGE) == k
            return lax.psum(jnp.where(here, value, jnp.zeros_like(value)), STAGE)

        return {name: one(owner) for name, owner in self.owners.items()}

    def add_shared(self, grads: list, shared: dict) -> list:
        """Traced: `grads` with all devices' gradients of tied parameters, at the owners."""
        grads = list(grads)
        for name, owner in self.owners.items():
            c, k = self.at(owner.stage)
            total = lax.psum(shared[name], STAGE)
            mine = jnp.where(lax.axis_index(STAGE) == k, total, jnp.zeros_like(total))
            grads[c] = self.params[c].add_leaf(owner.place, grads[c], mine)
        return grads

    # --- running statistics -----------------------------------------------------------------------

    def commit(self, s: int, stats: dict, moments: dict) -> dict:
        """Stage s's running statistics after a step, as one chunk's arrays on its device."""
        c, k = self.at(s)
        trees = zip(self.stats[c].read(k, stats), self.stats[c].read(k, moments), strict=True)
        new = []
        for run, (old, seen) in zip(self.runs[s], trees, strict=True):
            commit = run.layer.commit
            if run.scanned:
                new.append(jax.vmap(commit)(old, seen) if jax.tree.leaves(old) else old)
            else:
                new.append([commit(a, b) for a, b in zip(old, seen, strict=True)])
        return self.stats[c].write(k, new)

    # --- report -----------------------------------------------------------------------------------

    def parameter_bytes(self, k: int) -> int:
        """Bytes of device k's own parameters, in all its chunks."""
        cuts = self.layer_ranges[k :: self.num_devices]
        return sum(tree_bytes(self.shapes[i].params) for cut in cuts for i in cut)

    def device_bytes(self) -> int:
        """Bytes of the parameters that every device holds, padding included."""
        return sum(storage.device_bytes() for storage in self.params)

    def shared_bytes(self, least: int = 0) -> int:
        """Bytes of the tied parameters, of which every device has a copy during a step.

        In `least` bytes an element at least, as gradients are.
        """
        places = [owner.place for owner in self.owners.values()]
        return sum(place.size * max(place.dtype.itemsize, least) for place in places)


def _find_runs(shapes: Sequence[LayerShape], cut: range, longest_unrolled: int) -> list[Run]:
    runs = []
    for _, group in itertools.groupby(cut, key=lambda i: _run_key(shapes, i)):
        ids = list(group)
        scanned = len(ids) > longest_unrolled
        runs.append(Run(shapes[ids[0]].layer, ids[0] - cut[0], len(ids), scanned))
    return runs


def _run_key(shapes: Sequence[LayerShape], i: int) -> tuple:
    """Layers that follow each other may share a scan if equal, with outputs like their inputs.

    Not if they are linked to others: their names are their own.
    """
    shape = shapes[i]
    linked = shape.layer.stashes or shape.layer.pops or shape.layer.ties
    alone = linked or not same_shapes(shape.input, shape.output)
    return shape.layer, i if alone else -1
