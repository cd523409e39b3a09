"""Export the programs that a plan compiles: the whole step, and its pieces, to count their cycles.

A piece runs on one device: the forward or the backward of a stage or of a layer (once for all
with the same code), or the optimizer's update.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.layers.shape_inference import as_replica
from gpipe_jax.pipeline.device_step import Branch
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.stage_step import Call, StageStep, start_of_backward
from gpipe_jax.tpu_compiler.results import Program
from gpipe_jax.training.fitting.train_step import Updated
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils.trees import PyTree, float_leaves, wide

INDEX = jax.ShapeDtypeStruct((), jnp.int32)
STEP, UPDATE = "step", "update"  # programs beside those of the stages
Operation = Literal["forward", "backward"]
BOTH: tuple[Operation, ...] = ("forward", "backward")


def whole_step(trainer: Trainer) -> Program:
    """Export the whole step: forward, backward and update, all in place."""
    donate = tuple(range(len(jax.tree.leaves(trainer.train_step.abstract_arguments().arrays))))
    pipe = trainer.pipe
    mesh_shape = (pipe.stages.geometry.num_devices, pipe.replicas)
    return Program(STEP, trainer.export(), donate, mesh_shape)


class LayerBranch(NamedTuple):
    """Name the program of one layer alone; equal layers share one."""

    operation: Operation
    layer: int  # the first layer that runs this code


def of_stages(pipe: Pipeline) -> dict[Branch, Program]:
    """Export the programs of each distinct stage."""
    distinct = sorted(set(pipe.stages.representatives))
    return {
        Branch(operation, s): _EXPORTERS[operation](pipe, s, pipe.stages)
        for operation in BOTH
        for s in distinct
    }


def of_layers(pipe: Pipeline, operations: Sequence[Operation] = BOTH) -> dict[LayerBranch, Program]:
    """Export the programs of each distinct layer, as a stage of its own; see `representatives`."""
    exported = {}
    for i in sorted(set(representatives(pipe))):
        alone = _one_layer_each(pipe, only=i)
        for operation in operations:
            exported[LayerBranch(operation, i)] = _EXPORTERS[operation](pipe, i, alone)
    return exported


def representatives(pipe: Pipeline) -> list[int]:
    """Return for each layer the index of the first one with the same programs."""
    return _one_layer_each(pipe).representatives


def _one_layer_each(pipe: Pipeline, only: int | None = None) -> Stages:
    """Make each layer a stage; with `only`, store that layer alone, as if it had its own device.

    Its matrices are then slots, as in a stage of several such layers.
    """
    cuts = [range(i, i + 1) for i in range(len(pipe.shapes))]
    return Stages(pipe.shapes, cuts, remat=pipe.stages.remat, only=only)


def update(trainer: Trainer) -> Program:
    """Export the optimizer's update of what one device holds, from summed gradients."""
    before, grads = trainer.train_step.local_update_arguments()

    def run(before: Updated, grads: PyTree) -> Updated:
        return trainer.train_step.apply_gradients(before, grads, jnp.uint32(1), decaying=grads)

    return _program(UPDATE, run, (before, grads), donated=2)


def _stage(stages: Stages, s: int, pipe: Pipeline) -> tuple[Callable, tuple]:
    """Return a function that builds a stage from its arrays, and the shapes of these arrays."""
    c, _ = stages.geometry.at(s)
    borrowed: dict = {}  # the tied parameters that it uses
    for shape in (stages.geometry.shapes[i] for i in stages.geometry.layer_ranges[s]):
        borrowed |= skips_and_ties.offered(shape.layer, shape.own_params) | shape.borrowed
    storages = (stages.params, stages.stats, stages.fixed)
    params, stats, fixed = (storage[c].local_shapes() for storage in storages)

    def make(
        params: dict, stats: dict, fixed: dict, shared: dict, micro_batch: jax.Array, extras: dict
    ) -> StageStep:
        examples = pipe.micro_batch_size if pipe.keys_per == "example" else None
        key = step_key(jnp.uint32(0), jnp.uint32(0))
        call = Call(key, micro_batch, examples, True, jnp.float32(0.5), extras)
        ids = jnp.arange(max(map(len, stages.geometry.layer_ranges)), dtype=jnp.int32)
        return StageStep(stages, s, params, stats, fixed, shared, ids, call)

    return make, (params, stats, fixed, borrowed, INDEX, stages.geometry.extras)


def _forward(pipe: Pipeline, s: int, stages: Stages) -> Program:
    make, specs = _stage(stages, s, pipe)

    def run(arrays: tuple, x: PyTree) -> Any:
        return make(*arrays).forward(x)

    return _program(str(Branch("forward", s)), run, (specs, stages.geometry.input(s)))


def _backward(pipe: Pipeline, s: int, stages: Stages) -> Program:
    """Export a backward that adds to the sums of gradients, as between micro-batches."""
    make, specs = _stage(stages, s, pipe)
    shapes = [stages.geometry.shapes[i] for i in stages.geometry.layer_ranges[s]]
    frozen = frozenset().union(*(shape.frozen_ties for shape in shapes))
    shared = {name: a for name, a in specs[3].items() if name not in frozen}
    sums = jax.eval_shape(wide, (specs[0], shared))
    micro_batch = pipe.micro_batch_shapes
    if s == stages.geometry.last:
        start: Any = (micro_batch["labels"], micro_batch["weights"])
    else:
        start = float_leaves(stages.geometry.input(s + 1))

    def run(sums: tuple, arrays: tuple, x: PyTree, start: PyTree) -> tuple:
        def received_gradients(_: PyTree) -> tuple:
            return start, None

        begin = received_gradients
        if s == stages.geometry.last:
            begin = functools.partial(start_of_backward, pipe.loss, *start)
        back, moments, result = make(*arrays).backward(x, begin, *sums, extras={})
        d_x = back.x if s > 0 else []
        return (back.params, back.shared), d_x, moments, result

    arguments = (sums, specs, stages.geometry.input(s), start)
    return _program(str(Branch("backward", s)), run, arguments, donated=1)


_EXPORTERS: dict[Operation, Callable[[Pipeline, int, Stages], Program]] = {
    "forward": _forward,
    "backward": _backward,
}


def _program(name: str, function: Callable, specs: Sequence, donated: int = 0) -> Program:
    """Export a function of one micro-batch on one device; it may overwrite the first arguments."""
    donate = tuple(range(len(jax.tree.leaves(specs[:donated]))))
    exported = export.export(jax.jit(as_replica(function)), platforms=["tpu"])(*specs)
    return Program(name, exported, donate)
