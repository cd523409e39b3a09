"""A training state layer by layer, for checkpoints: the same for any K, V, D and schedule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.host_arrays import AnyMesh
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Storage
from gpipe_jax.pipeline.state import State
from gpipe_jax.utils.trees import PyTree, by_name, from_names, wide


class Trained(NamedTuple):
    """What training changes; what is in the form of the parameters is cut as they are."""

    state: State
    optimizer: PyTree
    average: PyTree  # of the parameters, if there is one


class LayerTrees(NamedTuple):
    """A training state by layer, in numpy."""

    common: Mapping[str, Any]  # what no layer has: "seed", and the optimizer's counts
    # By global id: "params", "statistics", "average" and, say, "optimizer.0.mu", each a tree.
    layers: Mapping[int, dict[str, PyTree]]


def split(stages: Stages, mesh: AnyMesh, trained: Trained) -> LayerTrees:
    """Copies of everything, of the layers that this process saves."""
    trees, common = _named(trained)
    host_arrays.start_copies(trees)
    layers: dict[int, dict[str, PyTree]] = {}
    for k in host_arrays.owned(mesh):
        for name, tree in trees.items():
            block = host_arrays.take(mesh, tree, k)
            for i, one in stages.split_block(_storages(stages, name), k, block).items():
                layers.setdefault(i, {})[name] = one
    return LayerTrees({name: np.array(value) for name, value in common.items()}, layers)


def join(stages: Stages, mesh: AnyMesh, saved: LayerTrees, local: Trained) -> Trained:
    """The inverse of `split`; asks for the layers of this process's devices only.

    `local` are the shapes of what one device has.
    """
    trees, common = _named(local)

    def block(k: int) -> dict[str, PyTree]:
        layers = {i: saved.layers[i] for i in stages.layers_of(k)}
        made = {
            name: stages.join_block(
                _storages(stages, name), k, lambda i, name=name: layers[i][name]
            )
            for name in trees
        }
        # Where a stage has nothing of a parameter's type, the optimizer's may be another.
        return jax.tree.map(lambda a, s: a.astype(s.dtype, copy=False), made, trees)

    placed = host_arrays.place(mesh, block)
    placed |= {name: host_arrays.replicate(mesh, saved.common[name]) for name in common}
    rest = from_names(_rest(local), placed, _is_like(local.state.params))
    state = State(placed["params"], placed["statistics"], placed["seed"])
    return Trained(state, **rest)


def shapes(stages: Stages, local: Trained) -> LayerTrees:
    """What all processes' `split` come to, as shapes."""
    trees, common = _named(local)
    layers = {}
    for i, shape in enumerate(stages.shapes):
        slots = jax.eval_shape(wide, shape.params)
        own = {"params": shape.params, "statistics": shape.stats}
        layers[i] = {name: own.get(name, slots) for name in trees}
    return LayerTrees(common, layers)


def _named(trained: Trained) -> tuple[dict, dict]:
    """By name what is cut over the devices, and what they all have."""
    state, alike = trained.state, _is_like(trained.state.params)
    named = by_name(_rest(trained), alike)
    trees = {name: tree for name, tree in named.items() if alike(tree)}
    common = {name: value for name, value in named.items() if name not in trees}
    trees |= {"params": state.params, "statistics": state.stats}
    return trees, {**common, "seed": state.seed}


def _rest(trained: Trained) -> dict[str, PyTree]:
    return {"optimizer": trained.optimizer, "average": trained.average}


def _is_like(params: PyTree) -> Callable[[PyTree], bool]:
    """Whether a tree has the form of the parameters."""
    structure = jax.tree.structure(params)
    return lambda node: jax.tree.structure(node) == structure


def _storages(stages: Stages, name: str) -> list[Storage]:
    return stages.stats if name == "statistics" else stages.params
