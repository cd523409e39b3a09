"""Convert a training state to one tree per layer for checkpoints, and back.

The trees are the same for any K, V, D and schedule. A checkpoint has these names:

    for each layer   params, statistics, average, optimizer.0.mu, ...   (trees)
    common           seed, optimizer.0.count, ...                       (no layer has them)

`params` are the parameters, trained and frozen; the other trees have trained ones only. Constants
are not saved: `join` computes them again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.host_arrays import AnyMesh
from gpipe_jax.pipeline.ragged import layer_trees
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.state import State, TrainArrays, fixed_arrays
from gpipe_jax.utils.trees import (
    PyTree,
    by_name,
    differentiable,
    from_names,
    has_structure_of,
    merge,
    select,
    wide,
)

_FIXED = "fixed"  # frozen parameters and constants: no name of a checkpoint


class LayerTrees(NamedTuple):
    """Hold a training state by layer, in numpy."""

    common: Mapping[str, Any]  # by name: the seed and the optimizer's counts
    layers: Mapping[int, dict[str, PyTree]]  # by global id of the layer, then by name


def split(stages: Stages, mesh: AnyMesh, arrays: TrainArrays) -> LayerTrees:
    """Copy everything: the layers that this process saves, and what no layer has."""
    trees, common = _named(arrays)
    host_arrays.start_copies(trees)
    layers = layer_trees.split(mesh, host_arrays.owned_rows(mesh), _storages(stages, trees), trees)
    for layer in layers.values():
        layer["params"] = merge(layer["params"], layer.pop(_FIXED).params)
    return LayerTrees({name: np.array(value) for name, value in common.items()}, layers)


def join(stages: Stages, mesh: AnyMesh, saved: LayerTrees, local: TrainArrays) -> TrainArrays:
    """Invert `split`: place a saved state on the devices of this process.

    It reads only the layers of these devices. `local` has the shapes of one device's arrays.
    """
    trees, common = _named(local)

    def layer(i: int) -> dict[str, PyTree]:
        trees_of_layer, shape = saved.layers[i], stages.geometry.shapes[i]
        params = trees_of_layer["params"]
        own = {"params": select(shape.params, params), _FIXED: fixed_arrays(shape, params)}
        return {**trees_of_layer, **own}

    placed = layer_trees.join(mesh, _storages(stages, trees), layer, trees)
    placed |= {name: host_arrays.replicate(mesh, saved.common[name]) for name in common}
    optimizer = from_names(_optimizer(local), placed, has_structure_of(local.state.params))
    state = State(placed["params"], placed["statistics"], placed[_FIXED], placed["seed"])
    return TrainArrays(state, optimizer["optimizer"], optimizer["average"])


def shapes(stages: Stages, local: TrainArrays) -> LayerTrees:
    """Return the shapes of what the `split` of all processes copies together."""
    trees, common = _named(local)
    layers = {}
    for i, shape in enumerate(stages.geometry.shapes):
        moments = jax.eval_shape(wide, shape.params)
        own = {"params": shape.own_params, "statistics": shape.stats}
        layers[i] = {name: own.get(name, moments) for name in trees if name != _FIXED}
    return LayerTrees(common, layers)


def not_finite(tree: PyTree) -> list[str]:
    """Return the names of the arrays of a layer that hold NaN or infinity."""
    floats = {name: a for name, a in by_name(tree).items() if differentiable(a)}
    return [name for name, a in floats.items() if not np.isfinite(a).all()]


def _named(arrays: TrainArrays) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Return by name the trees that are divided between devices, and the rest."""
    state, is_like_params = arrays.state, has_structure_of(arrays.state.params)
    named = by_name(_optimizer(arrays), is_like_params)
    trees = {name: tree for name, tree in named.items() if is_like_params(tree)}
    common = {name: value for name, value in named.items() if name not in trees}
    trees |= {"params": state.params, "statistics": state.stats, _FIXED: state.fixed}
    return trees, {**common, "seed": state.seed}


def _optimizer(arrays: TrainArrays) -> dict[str, PyTree]:
    """Return what the update adds to the state, under the names that checkpoints have for it."""
    return {"optimizer": arrays.opt_state, "average": arrays.average}


def _storages(stages: Stages, names: Mapping[str, Any]) -> dict[str, ChunkedStorage]:
    """Return how the tree of each name is stored."""
    others = {"statistics": stages.stats, _FIXED: stages.fixed}
    return {name: others.get(name, stages.params) for name in names}
