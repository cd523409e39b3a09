"""Hold what training changes: make it on the devices, and convert it to one tree per layer.

On the devices it is rectangular, and each device has its part (see `ragged`). As trees of numpy
arrays, one for each layer, it is the same for any number of stages.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gpipe_jax.data import casts
from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.host_arrays import AnyMesh
from gpipe_jax.distributed.mesh import (
    MeshLike,
    params_sharding,
    platform_of,
    replicated_sharding,
)
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.random_keys import layer_key
from gpipe_jax.layers.shape_inference import Fixed, LayerShape
from gpipe_jax.pipeline import spmd
from gpipe_jax.pipeline.ragged import layer_trees
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import of_all_devices
from gpipe_jax.utils.checks import count_problem
from gpipe_jax.utils.trees import (
    PyTree,
    describe,
    merge,
    path_name,
    same_shapes,
    select,
    strong,
)


class State(NamedTuple):
    """Hold what a pipeline carries from step to step.

    `Pipeline.init` makes one; `Pipeline.from_layers` makes one from given parameters. The arrays
    lie on the devices of the mesh. Use `Pipeline.to_layers` and `Pipeline.statistics` to read them
    layer by layer.

    Attributes:
        params: The trained parameters in rectangular form; axis 0 is divided between the devices.
        stats: The running statistics of batch norms, likewise.
        fixed: The frozen parameters and the constants, likewise.
        seed: The seed of all randomness in training, uint32 [].

    Example::

        state = pipe.init(seed=0)
        weights = pipe.to_layers(state)  # a list of trees of numpy arrays
    """

    params: PyTree
    stats: PyTree
    fixed: PyTree
    seed: jax.Array


class TrainState(NamedTuple):
    """Hold everything that training changes.

    `Trainer.init` makes one. `Trainer.step` and `Trainer.fit` take one and return the next. They
    update its arrays in place, so do not use the old one again.

    Attributes:
        state: The parameters, the running statistics and the seed.
        opt_state: The state of the optax transformation.
        step: The number of updates done so far.
        average: The moving average of the parameters, at least float32. None without one.
            Default: None.

    Example::

        current = trainer.init(seed=0)
        current, metrics = trainer.step(current, batch)
    """

    state: State
    opt_state: PyTree
    step: int
    average: PyTree = None

    @property
    def arrays(self) -> "TrainArrays":
        """Return everything but the number of the step."""
        return TrainArrays(self.state, self.opt_state, self.average)


class TrainArrays(NamedTuple):
    """Hold the arrays of a `TrainState`, or their shapes, or their shardings."""

    state: State
    opt_state: PyTree
    average: PyTree  # None without a moving average

    def at_step(self, step: int) -> TrainState:
        """Return the training state of these arrays after `step` updates."""
        return TrainState(self.state, self.opt_state, step, self.average)


# --- on the devices -------------------------------------------------------------------------------


def init(stages: Stages, mesh: MeshLike, seed: int) -> State:
    """Initialize the parameters, each on its own device; the same for every K, D and schedule."""
    if count_problem(seed, 0) or seed >= 2**32:
        message = f"`seed` must be a whole number from 0 to {2**32 - 1}, got {seed!r}"
        raise ArgumentError("seed", message)
    # It runs once, and on CPU its code takes six times as long to optimize as to compile.
    on_cpu = platform_of(mesh) == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
    make = functools.partial(_init, stages, mesh)
    jitted = jax.jit(make, out_shardings=shardings(stages, mesh), compiler_options=options)
    return _with_own_values(stages, mesh, jitted(np.uint32(seed)))


def _init(stages: Stages, mesh: MeshLike, seed: jax.Array) -> State:
    def all_params(shape: LayerShape, i: jax.Array) -> PyTree:
        if shape.layer.has_values:  # equal layers share this code, but not their values
            return _zeros(shape.own_params)
        return _params_of(shape, layer_key(seed, i))

    def params(shape: LayerShape, i: jax.Array) -> PyTree:
        return select(shape.params, all_params(shape, i))

    def stats(shape: LayerShape, i: jax.Array) -> PyTree:
        if shape.layer.has_values:
            return _zeros(shape.stats)
        return strong(shape.layer.init_statistics())

    def fixed(shape: LayerShape, i: jax.Array) -> Fixed:
        return fixed_arrays(shape, all_params(shape, i))

    return State(
        spmd.build_arrays(stages, stages.params, mesh, params),
        spmd.build_arrays(stages, stages.stats, mesh, stats),
        spmd.build_arrays(stages, stages.fixed, mesh, fixed),
        seed,
    )


def fixed_arrays(shape: LayerShape, params: PyTree) -> Fixed:
    """Return what of a layer never changes; `params` are its own parameters, trained and frozen."""
    frozen = select(shape.fixed.params, params)
    return Fixed(frozen, strong(shape.layer.init_constants()))


def _params_of(shape: LayerShape, key: jax.Array) -> PyTree:
    """Return the initial parameters that a layer owns."""
    initial = strong(shape.layer.init(key, _zeros(shape.input), **_zeros(shape.extras)))
    own = skips_and_ties.borrow(shape.layer, initial, shape.borrowed)[0]
    if not same_shapes(own, shape.own_params):
        raise ValueError(
            f"layer {shape.layer} makes the parameters {describe(own)}, but its `shapes` "
            f"returns {describe(shape.own_params)}; make the two agree"
        )
    return own


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def _with_own_values(stages: Stages, mesh: AnyMesh, state: State) -> State:
    """Replace the values of the layers that start with their own."""
    shapes = stages.geometry.shapes
    if not any(shape.layer.has_values for shape in shapes):
        return state
    storages = {"params": stages.params, "stats": stages.stats, "fixed": stages.fixed}
    arrays = {name: getattr(state, name) for name in storages}
    layers = layer_trees.split(mesh, host_arrays.local_rows(mesh), storages, arrays)

    def layer(i: int) -> Mapping[str, PyTree]:
        shape = shapes[i]
        if not shape.layer.has_values:
            return layers[i]
        own = _params_of(shape, jax.random.key(0))
        stats = strong(shape.layer.init_statistics())
        values = {"params": select(shape.params, own), "stats": stats}
        return jax.tree.map(np.asarray, {**values, "fixed": fixed_arrays(shape, own)})

    local = {name: getattr(local_shapes(stages), name) for name in storages}
    return state._replace(**layer_trees.join(mesh, storages, layer, local))


def local_shapes(stages: Stages) -> State:
    """Return the shapes of the arrays that one device holds."""
    seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
    params, stats, fixed = (
        storage.local_shapes() for storage in (stages.params, stages.stats, stages.fixed)
    )
    return State(params, stats, fixed, seed)


def shardings(stages: Stages, mesh: MeshLike) -> State:
    """Return the shardings of the arrays of a state."""
    sharded = jax.tree.map(lambda _: params_sharding(mesh), local_shapes(stages))
    return sharded._replace(seed=replicated_sharding(mesh))


def abstract(stages: Stages, mesh: MeshLike) -> State:
    """Return the shapes and shardings of a state's arrays."""

    def whole(chunks: list[dict]) -> list[dict]:
        return [of_all_devices(arrays, stages.geometry.num_devices) for arrays in chunks]

    def with_sharding(a: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    local = local_shapes(stages)
    state = State(whole(local.params), whole(local.stats), whole(local.fixed), local.seed)
    return jax.tree.map(with_sharding, state, shardings(stages, mesh))


# --- checks ---------------------------------------------------------------------------------------


def check(state: Any, expected: State) -> None:
    """Raise ArgumentError unless a pipeline can use a state; `expected` is its `abstract` one."""
    if isinstance(state, TrainState):
        problem = (
            "must be a State, got a TrainState; give `current.state`, or "
            "`trainer.evaluated(current)`"
        )
    elif not isinstance(state, State):
        problem = (
            f"must be a State, got {type(state).__name__}; give what `pipe.init(seed)` or "
            f"`pipe.from_layers(trees)` returns"
        )
    elif is_given_up(state):
        problem = (
            "has been updated in place by a training step, so it cannot be used again; give the "
            "state which that step or `fit` returned: `current.state`"
        )
    elif difference := layout_difference(state, expected):
        problem = (
            f"is of another pipeline: {difference}; take its layers over with "
            f"pipe.from_layers(other.to_layers(state), statistics=other.statistics(state))"
        )
    else:
        return
    raise ArgumentError("state", f"`state` {problem}")


def is_given_up(tree: PyTree) -> bool:
    """Return whether an update has taken arrays of a tree."""
    return any(a.is_deleted() for a in jax.tree.leaves(tree) if _is_concrete(a))


def layout_difference(state: State, expected: State) -> str | None:
    """Return how a state's arrays differ from the `abstract` ones of a pipeline; None if not."""
    own, here = _arrays(state), _arrays(expected)
    if _forms(own) == _forms(here):
        place, seed = expected.seed.sharding, state.seed
        moved = _is_concrete(seed) and seed.committed
        if moved and seed.sharding.device_set != place.device_set:
            return "its arrays are on other devices than this mesh's"
        return None
    (stages, chunks), (stages_here, chunks_here) = _layout(own), _layout(here)
    if stages and stages_here and stages != stages_here:
        return f"it is for {stages} devices along the stage axis, not {stages_here}"
    if chunks != chunks_here:
        return f"it is for {chunks} chunks on each device, not {chunks_here}"
    return "the network, the cut into stages or what is frozen differs"


def _arrays(state: State) -> tuple:
    return state.params, state.stats, state.fixed


def _forms(tree: PyTree) -> tuple:
    """Return the structure, shapes and types; users may have put numbers into a state."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(a), getattr(a, "dtype", None)) for a in leaves]


def _layout(arrays: tuple[list[dict], ...]) -> tuple[int | None, int]:
    """Return the devices along the stage axis, if an array shows them, and the chunks on each."""
    slots = [a for chunks in arrays for chunk in chunks for a in jax.tree.leaves(chunk["slots"])]
    return slots[0].shape[0] if slots else None, len(arrays[0])


def _is_concrete(a: Any) -> bool:
    return isinstance(a, jax.Array) and not isinstance(a, Tracer)


# --- layer by layer -------------------------------------------------------------------------------


def to_layers(stages: Stages, mesh: AnyMesh, tree: PyTree) -> list[PyTree]:
    """Copy the parameters of a state, or anything in their form: one tree for each layer.

    What is in the form of the trained parameters has None for frozen ones.
    """
    if not isinstance(tree, State):
        return _split(stages.params, mesh, tree)
    trained, fixed = (
        _split(stages.params, mesh, tree.params),
        _split(stages.fixed, mesh, tree.fixed),
    )
    return [merge(a, b.params) for a, b in zip(trained, fixed, strict=True)]


def statistics(stages: Stages, mesh: AnyMesh, state: State) -> list[PyTree]:
    """Copy the running statistics: one tree for each layer."""
    return _split(stages.stats, mesh, state.stats)


def _split(storage: ChunkedStorage, mesh: AnyMesh, arrays: PyTree) -> list[PyTree]:
    rows = host_arrays.local_rows(mesh)
    layers = layer_trees.split(mesh, rows, {"arrays": storage}, {"arrays": arrays})
    count = len(storage.geometry.shapes)
    if len(layers) < count:
        raise ValueError(
            f"this process's devices hold {len(layers)} of {count} layers; save a checkpoint, "
            f"which every process writes a part of"
        )
    return [layers[i]["arrays"] for i in range(count)]


def from_layers(
    stages: Stages,
    mesh: AnyMesh,
    params: Sequence[PyTree],
    statistics: Sequence[PyTree] | None,
    seed: int,
) -> State:
    """Invert `to_layers` and `statistics`; without `statistics`, start with initial ones."""
    shapes = stages.geometry.shapes
    if statistics is None:
        statistics = [strong(shape.layer.init_statistics()) for shape in shapes]
    _check_layers("parameters", shapes, params, [shape.own_params for shape in shapes])
    _check_layers("statistics", shapes, statistics, [shape.stats for shape in shapes])

    def layer(i: int) -> dict[str, PyTree]:
        own = select(shapes[i].params, params[i])
        fixed = fixed_arrays(shapes[i], params[i])
        return {"params": own, "stats": statistics[i], "fixed": fixed}

    storages = {"params": stages.params, "stats": stages.stats, "fixed": stages.fixed}
    local = {name: getattr(local_shapes(stages), name) for name in storages}
    joined = layer_trees.join(mesh, storages, layer, local)
    return State(**joined, seed=host_arrays.replicate(mesh, np.uint32(seed)))


def _check_layers(
    kind: str, shapes: Sequence[LayerShape], trees: Sequence[PyTree], expected: Sequence[PyTree]
) -> None:
    """Raise ValueError unless there is one tree per layer, with the expected shapes and types."""
    if len(trees) != len(shapes):
        raise ValueError(
            f"got {len(trees)} trees of {kind} for {len(shapes)} layers; give one tree per layer"
        )
    for i, (tree, like) in enumerate(zip(trees, expected, strict=True)):
        # As JAX takes them: float64 becomes float32, unless `jax_enable_x64` is on.
        given = jax.eval_shape(lambda tree: tree, tree)
        if not same_shapes(given, like):
            raise ValueError(
                f"layer {i}, {shapes[i].layer}, has {kind} {describe(like)}, got "
                f"{describe(given)}; give arrays of these shapes and types"
            )
        for (path, a), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True
        ):
            if getattr(a, "dtype", None) != spec.dtype:  # numbers might become infinite
                name = f"{kind} of layer {i}, {path_name(path)!r},"
                casts.cast(name, np.asarray(a), spec.dtype)
