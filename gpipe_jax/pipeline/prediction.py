"""Compute the outputs of a network for any number of examples, and for inputs of other shapes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.mesh import MeshLike
from gpipe_jax.errors import DataError
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.pipeline.batches import checks
from gpipe_jax.pipeline.batches import micro_batches as batches
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.state import State
from gpipe_jax.utils.trees import PyTree, describe, signature


class Shapes(NamedTuple):
    """Hold what a pipeline was built for."""

    example: dict
    micro_batch: dict  # on one replica
    layers: Sequence[LayerShape]


class Predictor:
    """Run the forward pass on batches of inputs and extras; compile it once for each shape.

    Args:
        mesh: The devices.
        micro_batches: M.
        replicas: D.
        shapes: The shapes of the pipeline's example.
        stages: The stages for these shapes.
        infer: The function from the shapes of a micro-batch to those of all layers.
        divide: The function from the shapes of all layers to stages.
        outputs: The traced function (stages, state, micro-batches) -> outputs [M, D*B, ...].
    """

    def __init__(
        self,
        mesh: MeshLike,
        micro_batches: int,
        replicas: int,
        shapes: Shapes,
        stages: Stages,
        *,
        infer: Callable[[dict], Sequence[LayerShape]],
        divide: Callable[[Sequence[LayerShape]], Stages],
        outputs: Callable[[Stages, State, dict], PyTree],
    ) -> None:
        self._mesh, self._micro_batches, self._replicas = mesh, micro_batches, replicas
        self._shapes, self._infer, self._divide = shapes, infer, divide
        self._outputs = jax.jit(outputs, static_argnums=0)
        own = {name: shapes.micro_batch[name] for name in ("inputs", "extras")}
        self._stages = {signature(own): stages}

    def __call__(self, state: State, batch: dict) -> PyTree:
        """Return the outputs for a batch {"inputs", "extras"} of any number of examples."""
        examples, outputs = self._shapes.example["weights"].shape[0], []
        for part in batches.parts(batch, examples):
            count = checks.count_examples(part["inputs"])
            split = batches.split_inputs(part, self._shapes.example, self._micro_batches)
            placed = host_arrays.place_batch(self._mesh, split, list(range(self._replicas)))
            stages = self._stages_for(batches.of_replica(split, self._replicas))
            out = self._outputs(stages, state, placed)
            outputs.append(jax.tree.map(lambda a, n=count: a.reshape(-1, *a.shape[2:])[:n], out))
            jax.block_until_ready(outputs[-1])
        return jax.tree.map(lambda *a: jnp.concatenate(a), *outputs)

    def _stages_for(self, micro_batch: dict) -> Stages:
        """Return the stages for inputs and extras of these shapes; equal ones get one object."""
        key = signature(micro_batch)
        if key not in self._stages:
            self._stages[key] = self._divide_for(micro_batch)
        return self._stages[key]

    def _divide_for(self, micro_batch: dict) -> Stages:
        """Return the stages for inputs of other shapes; their parameters are stored alike."""
        inputs, own = micro_batch["inputs"], self._shapes.micro_batch["inputs"]
        try:
            shapes = self._infer(micro_batch)
        except ValueError as error:
            raise DataError(
                f"the network does not take inputs {describe(inputs)}; the pipeline's example had "
                f"{describe(own)}: {error}"
            ) from error
        for i, (shape, expected) in enumerate(zip(shapes, self._shapes.layers, strict=True)):
            if signature(shape.params) != signature(expected.params):
                raise DataError(
                    f"for inputs {describe(inputs)} layer {i}, {shape.layer}, has parameters "
                    f"{describe(shape.params)}; this pipeline has {describe(expected.params)}, as "
                    f"its example had inputs {describe(own)}; change only axes that no parameter "
                    f"depends on"
                )
        return self._divide(shapes)
