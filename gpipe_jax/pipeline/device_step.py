"""Run one entry of a schedule table on one device: a forward, a backward or an evaluation.

A forward sends the stage's output on. A backward recomputes the stage from its stashed input
(GPipe, section 2.3) and adds the gradients of its parameters, in float32, to the device's sums: see
`stage_step`. `executor` calls this for each entry of the table.

Letters: M micro-batches, B examples of a micro-batch on one replica, V chunks, k device, s stage.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.distributed.mesh import replica_index
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses.weighting import weighted_sums
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.stage_step import Call, StageStep, start_of_backward
from gpipe_jax.utils.trees import PyTree, float_leaves, wide, with_floats


class Branch(NamedTuple):
    """Name a piece of code that a device runs in a tick; equal stages share one."""

    operation: Literal["idle", "forward", "backward", "evaluate"]
    stage: int | None = None  # the first stage that runs this code; None if idle

    def __str__(self) -> str:
        return self.operation if self.stage is None else f"{self.operation} {self.stage}"


IDLE = Branch("idle")


class Entry(NamedTuple):
    """Hold the numbers of one entry of the lowered table."""

    micro_batch: jax.Array
    x_slot: jax.Array  # where its input is
    g_slot: jax.Array  # where the gradient of its output is


class Sums(NamedTuple):
    """Hold what a device adds up over the ticks."""

    grads: list  # gradients of the trained parameters, in their form
    shared: dict  # gradients of the trained tied parameters
    moments: list  # moments of batch norms, in the form of the running statistics
    extras: dict  # gradients of extras, [M, B, ...]
    result: PyTree  # loss and metrics, or the outputs [M, B, ...]


class Buffers(NamedTuple):
    """Hold encoded boundaries in slots until their last use; each array is [slots, ...]."""

    x: list  # stashed inputs
    g: list  # gradients of outputs


class TickResult(NamedTuple):
    """Hold what a device sends after a tick, and its sums."""

    send_x: list  # encoded boundary, for the next stage
    send_g: list  # encoded gradient, for the previous stage
    sums: Sums


@dataclass(frozen=True)
class DeviceStep:
    """Hold the arrays of one device, and run its entries of the table."""

    stages: Stages
    trains: bool  # whether the schedule has backwards
    loss: Callable | None
    per_example: bool  # whether each example has random keys of its own
    replicas: int
    params: list  # trained, of each chunk
    stats: list  # running statistics of each chunk
    fixed: list  # frozen parameters and constants of each chunk
    shared: dict  # tied parameters, trained and frozen
    ids: jax.Array  # [V, longest stage]: global ids of its stages' layers
    batch: dict  # inputs and extras [M, elements of a micro-batch]; other leaves are [M, B, ...]
    key: jax.Array  # random key of the step
    progress: jax.Array  # fraction of the training run that is done, 0 to 1
    extras_gradients: tuple[str, ...]  # the extras whose gradients are asked for

    def zero_sums(self, micro_batches: int) -> Sums:
        """Return the sums before the first tick."""
        shared = {name: self.shared[name] for name in self.stages.ties.owners}
        trained = (self.params, shared, self.stats) if self.trains else ([], {}, [])
        rows = {name: self.stages.geometry.extras[name] for name in self.extras_gradients}
        shapes, row = jax.eval_shape(wide, (trained, rows))
        grads, shared, moments = _zeros(shapes)
        extras = _zeros(row, micro_batches)
        return Sums(grads, shared, moments, extras, self._zero_result(micro_batches))

    def _zero_result(self, micro_batches: int) -> PyTree:
        output, leading = self.stages.geometry.shapes[-1].output, (micro_batches,)
        if self.loss is not None:
            first = jax.tree.map(lambda a: a[0], (self.batch["labels"], self.batch["weights"]))
            loss = functools.partial(weighted_sums, self.loss)
            output, leading = jax.eval_shape(loss, output, *first), ()
        return _zeros(output, *leading)

    def run(self, branch: Branch, buffers: Buffers, entry: Entry, idle: TickResult) -> TickResult:
        """Run `branch`; `idle` has the sums so far and what an idle device sends."""
        if branch.stage is None:
            return idle
        methods = {"forward": self._forward, "backward": self._backward, "evaluate": self._evaluate}
        return methods[branch.operation](branch.stage, buffers, entry, idle)

    def _forward(self, s: int, buffers: Buffers, entry: Entry, idle: TickResult) -> TickResult:
        y, moments = self._stage(s, entry).forward(self._input(s, buffers, entry))
        return idle._replace(
            send_x=self.stages.boundary_format.encode(
                jax.tree.leaves(y),
                jax.tree.leaves(self.stages.geometry.input(s + 1)),
                self.boundary_shapes,
            ),
            sums=self._with_moments(s, idle.sums, moments),
        )

    def _evaluate(self, s: int, buffers: Buffers, entry: Entry, idle: TickResult) -> TickResult:
        y, _ = self._stage(s, entry).forward(self._input(s, buffers, entry))
        if self.loss is None:
            put_output = functools.partial(put, i=entry.micro_batch)
            result = jax.tree.map(put_output, idle.sums.result, y.x)
        else:
            result = jax.tree.map(jnp.add, idle.sums.result, self._loss(y.x, entry))
        return idle._replace(sums=idle.sums._replace(result=result))

    def _backward(self, s: int, buffers: Buffers, entry: Entry, idle: TickResult) -> TickResult:
        """Recompute the stage from its input, and add its gradients to the sums.

        The stage passes on skips that cross it, forward and backward, without computing with them.
        """
        passing, (c, _) = self.stages.geometry.passing(s), self.stages.geometry.at(s)
        x, _ = _split_skips(self._input(s, buffers, entry), passing)
        if s == self.stages.geometry.last:
            passed = {}
            start = functools.partial(start_of_backward, self.loss, *self._targets(entry))
        else:
            arrived, passed = _split_skips(self._gradient(s, buffers, entry), passing)
            start = functools.partial(_start_from, jax.tree.leaves(arrived))
        sums = idle.sums
        backward, m = self._stage(s, entry).backward, entry.micro_batch
        row = jax.tree.map(lambda a: get(a, m), sums.extras)
        back, moments, result = backward(x, start, sums.grads[c], sums.shared, row)
        grads = [back.params if i == c else g for i, g in enumerate(sums.grads)]
        extras = jax.tree.map(lambda a, new: put(a, new, m), sums.extras, back.extras)
        sums = sums._replace(grads=grads, shared=back.shared, extras=extras)
        if s == self.stages.geometry.last:
            sums = sums._replace(result=jax.tree.map(jnp.add, sums.result, result))
            sums = self._with_moments(s, sums, moments)
        if s == 0:
            return idle._replace(sums=sums)
        inner = with_floats(x, back.x, rest=_no_gradient)
        boundary = Boundary(inner.x, {**inner.skips, **passed})
        sent = self.stages.boundary_format.encode(
            jax.tree.leaves(boundary),
            float_leaves(self.stages.geometry.input(s)),
            self.gradient_shapes,
        )
        return idle._replace(send_g=sent, sums=sums)

    def _stage(self, s: int, entry: Entry) -> StageStep:
        c, _ = self.stages.geometry.at(s)
        examples = self.micro_batch_size if self.per_example else None
        micro_batch = entry.micro_batch * self.replicas + replica_index()
        extras = self._of_batch("extras", self.stages.geometry.extras, entry)
        call = Call(
            self.key,
            micro_batch,
            examples,
            self.trains,
            self.progress,
            extras,
            self.extras_gradients,
        )
        arrays = (self.params[c], self.stats[c], self.fixed[c], self.shared)
        return StageStep(self.stages, s, *arrays, self.ids[c], call)

    def _with_moments(self, s: int, sums: Sums, moments: list) -> Sums:
        """Add the moments of one forward of a micro-batch; call it for no recomputation."""
        if not jax.tree.leaves(moments):
            return sums
        (c, k), chunks = self.stages.geometry.at(s), list(sums.moments)
        new = self.stages.stats[c].write(k, moments)
        chunks[c] = jax.tree.map(jnp.add, chunks[c], new)
        return sums._replace(moments=chunks)

    def _input(self, s: int, buffers: Buffers, entry: Entry) -> Boundary:
        """Return the input of stage s: from the batch, or from its slot."""
        if s == 0:
            return Boundary(self._of_batch("inputs", self.stages.geometry.input(0).x, entry), {})
        leaves, structure = jax.tree.flatten(self.stages.geometry.input(s))
        arrays = [get(a, entry.x_slot) for a in buffers.x]
        return jax.tree.unflatten(structure, self.stages.boundary_format.decode(arrays, leaves))

    def _of_batch(self, name: str, shapes: PyTree, entry: Entry) -> PyTree:
        """Return the inputs or the extras of a micro-batch, which have these shapes."""

        def read(a: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
            return get(a, entry.micro_batch).reshape(shape.shape)

        return jax.tree.map(read, self.batch[name], shapes)

    def _gradient(self, s: int, buffers: Buffers, entry: Entry) -> Boundary:
        """Return the gradient of the output of stage s; None in place of leaves without one."""
        like = self.stages.geometry.input(s + 1)
        arrays = [get(a, entry.g_slot) for a in buffers.g]
        values = self.stages.boundary_format.decode(arrays, float_leaves(like))
        return with_floats(like, values, rest=_no_gradient)

    @property
    def boundary_shapes(self) -> list:
        """Return the shapes of an encoded boundary."""
        return self.stages.boundary_format.shapes

    @property
    def gradient_shapes(self) -> list:
        """Return the shapes of an encoded gradient; empty if the schedule has no backwards."""
        return self.stages.boundary_format.gradient_shapes if self.trains else []

    @property
    def micro_batch_size(self) -> int:
        """Return B."""
        return jax.tree.leaves(self.stages.geometry.input(0).x)[0].shape[0]

    def _loss(self, outputs: PyTree, entry: Entry) -> tuple:
        assert self.loss is not None  # a program without a loss returns outputs
        return weighted_sums(self.loss, outputs, *self._targets(entry))

    def _targets(self, entry: Entry) -> tuple:
        """Return the labels and weights of a micro-batch."""
        targets = (self.batch["labels"], self.batch["weights"])
        return jax.tree.map(lambda a: get(a, entry.micro_batch), targets)


def _zeros(shapes: PyTree, *leading: int) -> PyTree:
    """Return zeros of these shapes, with further axes in front."""
    return jax.tree.map(lambda s: jnp.zeros((*leading, *s.shape), s.dtype), shapes)


def _start_from(gradients: list, _: Boundary) -> tuple[list, None]:
    """Start a backward from gradients that arrived, whatever the recomputed output."""
    return gradients, None


def _no_gradient(_: jax.Array) -> None:
    """Stand in for the gradient of a leaf that is not a float."""


def _split_skips(boundary: Boundary, passing: set[str]) -> tuple[Boundary, dict]:
    """Return the boundary that a stage computes with, and the skips that only cross it."""
    own = {name: a for name, a in boundary.skips.items() if name not in passing}
    passed = {name: a for name, a in boundary.skips.items() if name in passing}
    return Boundary(boundary.x, own), passed


def get(array: jax.Array, i: jax.Array) -> jax.Array:
    """Return element i along the first axis."""
    return lax.dynamic_index_in_dim(array, i, 0, keepdims=False)


def put(array: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    """Return the array with `value` as element i along the first axis."""
    return lax.dynamic_update_index_in_dim(array, value, i, 0)
