"""Ragged stages made rectangular: with `wire`, all that knows that stages differ.

One SPMD program runs on every device, so every device holds arrays of the same shapes. Two kinds:

- a *slot* `[K, n, ...]` holds one parameter of a run of up to n equal layers, for every stage that
  has a parameter of that shape (the body of a Transformer: nothing wasted, no relayout);
- a *pack* `[K, P]` of each dtype holds the rest of a stage's parameters end to end, padded to the
  largest stage (convolution stages, an embedding or a head).

What crosses the boundaries is made rectangular in `wire`. Stages with the same layers and the same
input share one `kind`: one compiled body.

Letters: K stages, k stage, n layers in a run, P packed elements.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.keys import apply_key
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shapes import LayerShape, same_shapes, signature
from gpipe_jax.wire import Wire, like, pack

PyTree = Any

# Slots may make a device's parameters this much larger than packing everything would: they spare
# the copies that reading a matrix out of a pack costs on TPU.
SLOT_SLACK = 0.05

# Longer runs of equal layers are a `lax.scan`. Shorter ones are unrolled: a scan stacks what its
# backward pass keeps, which cost 1.3 times the time on CPU and 1.25 times the memory on TPU v5p,
# while unrolling five layers a stage took 3.7 times as long to compile.
MAX_UNROLL = 8


class Place(NamedTuple):
    """Where one parameter of a run of layers is kept."""

    shape: tuple[int, ...]  # of one layer's parameter
    dtype: np.dtype
    slot: int | None  # index of the slot, or None if packed
    offset: int  # of the first element within the pack


class Run(NamedTuple):
    """Equal layers that follow each other within a stage."""

    layer: Layer
    start: int  # position in the stage
    count: int
    treedef: Any  # of one layer's parameters
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


class Stages:
    """A network cut into K stages, with the rectangular form of its parameters and boundaries."""

    def __init__(
        self, shapes: Sequence[LayerShape], cuts: Sequence[range], *, remat_layers: bool = False
    ) -> None:
        self.shapes, self.cuts, self.remat_layers = shapes, cuts, remat_layers
        self.wire = Wire([shapes[cut[0]].input for cut in cuts[1:]])
        runs = [_find_runs(shapes, cut) for cut in cuts]
        self.slots, self.packs, self.runs = _choose_storage(runs)
        names: dict = {}
        self.kind = [names.setdefault(self._signature(k), k) for k in range(len(cuts))]

    @property
    def count(self) -> int:
        """K."""
        return len(self.cuts)

    @property
    def last(self) -> int:
        """K - 1."""
        return len(self.cuts) - 1

    def input(self, k: int) -> PyTree:
        """Stage k's input, as shapes."""
        return self.shapes[self.cuts[k][0]].input

    def _signature(self, k: int) -> tuple:
        """Stages with equal signatures run the same code: same layers, same place at the ends."""
        ends = (k == 0, k == self.last)
        layers = tuple((run.layer, run.count, run.places) for run in self.runs[k])
        return ends, signature(self.input(k)), layers

    # --- parameters -------------------------------------------------------------------------------

    def layer_ids(self) -> np.ndarray:
        """int32 [K, longest stage]: the global ids of each stage's layers, padded with zeros."""
        ids = np.zeros((self.count, max(len(cut) for cut in self.cuts)), np.int32)
        for k, cut in enumerate(self.cuts):
            ids[k, : len(cut)] = cut
        return ids

    def local_shapes(self) -> dict:
        """One device's parameters, as a tree of shapes: {"slots": [...], "packs": [...]}."""
        slots = [jax.ShapeDtypeStruct((s.depth, *s.shape), s.dtype) for s in self.slots]
        return {"slots": slots, "packs": [jax.ShapeDtypeStruct(*like(p)) for p in self.packs]}

    def used(self, k: int) -> dict[str, list[int]]:
        """Indices of the slots and packs that stage k reads: nothing else gets a gradient there."""
        places = [place for run in self.runs[k] for place in run.places]
        dtypes = {p.dtype for p in places if p.slot is None}
        return {
            "slots": sorted({p.slot for p in places if p.slot is not None}),
            "packs": [i for i, p in enumerate(self.packs) if p.dtype in dtypes],
        }

    def read(self, k: int, params: dict) -> list[PyTree]:
        """For each run of stage k its parameters, with a leading axis [n] if the run has n > 1."""
        packs = {spec.dtype: flat for spec, flat in zip(self.packs, params["packs"], strict=True)}
        trees = []
        for run in self.runs[k]:
            leaves = []
            for place in run.places:
                if place.slot is not None:
                    rows = params["slots"][place.slot][: run.count]
                else:
                    size = run.count * int(np.prod(place.shape))
                    rows = packs[place.dtype][place.offset : place.offset + size]
                    rows = rows.reshape((run.count, *place.shape))
                leaves.append(rows if run.count > 1 else rows[0])
            trees.append(jax.tree.unflatten(run.treedef, leaves))
        return trees

    def write(self, k: int, trees: Sequence[PyTree], xp: Any = jnp) -> dict:
        """The inverse of `read`: one device's parameters, zero where stage k has none."""
        local = self.local_shapes()
        slots = [xp.zeros(*like(s)) for s in local["slots"]]
        packed: dict = {spec.dtype: [] for spec in self.packs}
        for run, tree in zip(self.runs[k], trees, strict=True):
            for place, leaf in zip(run.places, jax.tree.leaves(tree), strict=True):
                rows = xp.reshape(leaf, (run.count, *place.shape))
                if place.slot is None:
                    packed[place.dtype].append(rows)
                else:
                    rest = xp.zeros_like(slots[place.slot][run.count :])
                    slots[place.slot] = xp.concatenate([rows, rest])
        return {"slots": slots, "packs": [pack(packed[s.dtype], s, xp) for s in self.packs]}

    def build(
        self, k: int, ids: jax.Array, make: Callable[[LayerShape, jax.Array], PyTree]
    ) -> dict:
        """One device's parameters from `make(shape, layer id)`, called once for each run."""
        trees = []
        for run in self.runs[k]:
            shape = self.shapes[self.cuts[k][run.start]]
            run_ids = ids[run.start : run.start + run.count]
            one = lambda i, shape=shape: make(shape, i)  # noqa: E731
            trees.append(one(run_ids[0]) if run.count == 1 else jax.lax.map(one, run_ids))
        return self.write(k, trees)

    def split_layers(self, k: int, params: dict) -> list[PyTree]:
        """Stage k's parameters as one tree for each of its layers."""
        layers = []
        for run, tree in zip(self.runs[k], self.read(k, params), strict=True):
            if run.count == 1:
                layers.append(tree)
            else:
                layers += [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(run.count)]
        return layers

    def join_layers(self, k: int, layers: Sequence[PyTree]) -> dict:
        """The inverse of `split_layers`, in numpy."""
        trees = []
        for run in self.runs[k]:
            group = layers[run.start : run.start + run.count]
            trees.append(jax.tree.map(lambda *a: np.stack(a), *group))
        return self.write(k, trees, np)

    # --- computation ------------------------------------------------------------------------------

    def forward(
        self, k: int, params: dict, x: PyTree, ids: jax.Array, key: jax.Array, micro_batch: Any,
        *, train: bool,
    ) -> PyTree:  # fmt: skip
        """Stage k's output for input `x`; a long run of equal layers is one `lax.scan`."""
        for run, tree in zip(self.runs[k], self.read(k, params), strict=True):

            def one(x: PyTree, layer: tuple, run: Run = run) -> tuple[PyTree, None]:
                p, layer_id = layer
                k_layer = apply_key(key, layer_id, micro_batch)
                return run.layer.apply(p, x, k_layer, train=train), None

            body = jax.checkpoint(one) if self.remat_layers else one
            run_ids = ids[run.start : run.start + run.count]
            if run.count == 1:
                x, _ = body(x, (tree, run_ids[0]))
            elif run.count <= MAX_UNROLL:
                for i in range(run.count):
                    x, _ = body(x, jax.tree.map(lambda a, i=i: a[i], (tree, run_ids)))
            else:
                x, _ = jax.lax.scan(body, x, (tree, run_ids))
        return x

    # --- report -----------------------------------------------------------------------------------

    def parameter_bytes(self, k: int) -> int:
        """Bytes of stage k's own parameters."""
        leaves = [a for i in self.cuts[k] for a in jax.tree.leaves(self.shapes[i].params)]
        return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in leaves)

    def device_bytes(self) -> int:
        """Bytes of the parameters that every device holds, padding included."""
        packs = sum(p.shape[0] * p.dtype.itemsize for p in self.packs)
        return packs + sum(s.size for s in self.slots)


def _find_runs(shapes: Sequence[LayerShape], cut: range) -> list[Run]:
    """The runs of a stage, with their parameters not yet placed (offset 0, no slot)."""
    runs = []
    for _, group in itertools.groupby(cut, key=lambda i: _run_key(shapes, i)):
        ids = list(group)
        leaves, treedef = jax.tree.flatten(shapes[ids[0]].params)
        places = tuple(Place(tuple(a.shape), np.dtype(a.dtype), None, 0) for a in leaves)
        runs.append(Run(shapes[ids[0]].layer, ids[0] - cut[0], len(ids), treedef, places))
    return runs


def _run_key(shapes: Sequence[LayerShape], i: int) -> tuple:
    """Layers that follow each other may share a scan if equal, with outputs like their inputs."""
    return shapes[i].layer, -1 if same_shapes(shapes[i].input, shapes[i].output) else i


def _choose_storage(stages: list[list[Run]]) -> tuple[list[Slot], list, list[tuple[Run, ...]]]:
    """Slots for what is alike, packs for the rest.

    The j-th parameter of a shape within a stage is a candidate for the j-th slot of that shape.
    Packing everything is smallest; the largest candidates become slots first, as long as a device's
    parameters grow by no more than `SLOT_SLACK` in all.
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


def _candidates(runs: list[Run]) -> dict:
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


def _place(runs: list[Run], candidates: dict, index: dict) -> tuple[tuple[Run, ...], dict]:
    """The runs with every parameter placed, and the packed elements they need of each dtype."""
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
