"""`State`, what a pipeline carries from step to step: made on the devices, and layer by layer.

On the devices it is rectangular, and each has its part; as trees of numpy arrays, one for each
layer, it is the same for any number of stages.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.host_arrays import AnyMesh
from gpipe_jax.distributed.mesh import STAGE, platform_of
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.random_keys import layer_key
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.pipeline import spmd
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Storage, of_all_devices
from gpipe_jax.utils.trees import PyTree, describe


class State(NamedTuple):
    """What a pipeline carries from step to step."""

    params: PyTree  # rectangular, axis 0 is cut over the devices; see `Pipeline.to_layers`
    stats: PyTree  # running statistics of batch norms, likewise; see `Pipeline.statistics`
    seed: jax.Array  # of all randomness in training; uint32 []


# --- on the devices -------------------------------------------------------------------------------


def init(stages: Stages, mesh: Mesh | AbstractMesh, seed: int) -> State:
    """Fresh parameters, each made on its own device; the same for every K, D and schedule."""
    # It runs once, and on CPU its code takes six times as long to optimize as to compile.
    on_cpu = platform_of(mesh) == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
    places = shardings(stages, mesh)
    make = functools.partial(_init, stages, mesh)
    return jax.jit(make, out_shardings=places, compiler_options=options)(np.uint32(seed))


def _init(stages: Stages, mesh: Mesh | AbstractMesh, seed: jax.Array) -> State:
    def params(shape: LayerShape, i: jax.Array) -> PyTree:
        x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape.input)
        fresh = shape.layer.init(layer_key(seed, i), x)
        return skips_and_ties.borrow(shape.layer, fresh, shape.borrowed)[0]

    def stats(shape: LayerShape, i: jax.Array) -> PyTree:
        return shape.layer.init_statistics()

    return State(
        spmd.build_arrays(stages, stages.params, mesh, params),
        spmd.build_arrays(stages, stages.stats, mesh, stats),
        seed,
    )


def local_shapes(stages: Stages) -> State:
    """What one device holds, as shapes."""
    params, stats = (
        [storage.local_shapes() for storage in storages]
        for storages in (stages.params, stages.stats)
    )
    seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
    return State(params, stats, seed)


def shardings(stages: Stages, mesh: Mesh | AbstractMesh) -> State:
    """Where the parts of a state lie."""
    stage, everywhere = NamedSharding(mesh, P(STAGE)), NamedSharding(mesh, P())
    return jax.tree.map(lambda _: stage, local_shapes(stages))._replace(seed=everywhere)


def abstract(stages: Stages, mesh: Mesh | AbstractMesh) -> State:
    """The shapes and places of a state's arrays."""
    local = local_shapes(stages)
    params, stats = (
        [of_all_devices(arrays, stages.num_devices) for arrays in chunks]
        for chunks in (local.params, local.stats)
    )
    shape = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(shape, State(params, stats, local.seed), shardings(stages, mesh))


# --- layer by layer -------------------------------------------------------------------------------


def to_layers(stages: Stages, mesh: AnyMesh, tree: PyTree) -> list[PyTree]:
    """The parameters' trees: of a state, or of anything in the form of its `params`."""
    params = tree.params if isinstance(tree, State) else tree
    return _split(stages, mesh, stages.params, params)


def statistics(stages: Stages, mesh: AnyMesh, state: State) -> list[PyTree]:
    """The running statistics' trees."""
    return _split(stages, mesh, stages.stats, state.stats)


def _split(
    stages: Stages, mesh: AnyMesh, storages: Sequence[Storage], tree: PyTree
) -> list[PyTree]:
    layers: dict[int, PyTree] = {}
    for k in host_arrays.held(mesh):
        layers |= stages.split_block(storages, k, host_arrays.take(mesh, tree, k))
    if len(layers) < len(stages.shapes):
        raise ValueError(
            f"this process's devices hold {len(layers)} of {len(stages.shapes)} layers; save a "
            f"checkpoint, which every process writes a part of"
        )
    return [layers[i] for i in range(len(stages.shapes))]


def from_layers(
    stages: Stages,
    mesh: AnyMesh,
    params: Sequence[PyTree],
    statistics: Sequence[PyTree] | None,
    seed: int,
) -> State:
    """The inverse of `to_layers` and `statistics`; without `statistics`, with fresh ones."""
    shapes = stages.shapes
    if statistics is None:
        statistics = [shape.layer.init_statistics() for shape in shapes]
    _check_layers("parameters", shapes, params, [shape.params for shape in shapes])
    _check_layers("statistics", shapes, statistics, [shape.stats for shape in shapes])

    def join(storages: Sequence[Storage], layers: Sequence[PyTree]) -> list[PyTree]:
        return host_arrays.place(mesh, lambda k: stages.join_block(storages, k, layers.__getitem__))

    whole = host_arrays.replicate(mesh, np.uint32(seed))
    return State(join(stages.params, params), join(stages.stats, statistics), whole)


def _check_layers(
    what: str, shapes: Sequence[LayerShape], trees: Sequence[PyTree], wanted: Sequence[PyTree]
) -> None:
    if len(trees) != len(shapes):
        raise ValueError(f"{len(trees)} trees of {what} for {len(shapes)} layers")
    for i, (tree, like) in enumerate(zip(trees, wanted, strict=True)):
        # As JAX takes them: float64 is float32, unless `jax_enable_x64` is on.
        have = jax.eval_shape(lambda tree: tree, tree)
        forms = [jax.tree.map(lambda a: (a.shape, a.dtype), one) for one in (have, like)]
        if forms[0] != forms[1]:
            raise ValueError(
                f"layer {i}, {shapes[i].layer}, has {what} {describe(like)}, got {describe(have)}; "
                f"give arrays of these shapes and types"
            )
