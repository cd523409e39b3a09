"""What one device has, and what it does with one entry of a schedule table.

A forward hands the stage's output on. A backward recomputes the stage from its stashed input
(GPipe, section 2.3) and adds its parameters' gradients, in float32, to what the device has: see
`composite`. `executor` does this for all entries.

Letters: M micro-batches, B examples of a micro-batch on one replica, k device, s stage.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses import weighted_sums
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
    """The micro-batch of one entry of the table, and where its input and its gradient are kept."""

    micro_batch: jax.Array
    x: jax.Array
    g: jax.Array


class Sums(NamedTuple):
    """What a device adds up over the ticks."""

    grads: list  # of the parameters, in their form
    shared: dict  # gradients of the tied parameters
    moments: list  # of batch norms, in the form of the running statistics
    result: PyTree  # loss and metrics, or the outputs [M, B, ...]


class Kept(NamedTuple):
    """Boundaries until they are used, as wire arrays."""

    x: list  # [slots, *wire]: the stash, inputs until their last use
    g: list  # [slots, *wire]: gradients


class Work(NamedTuple):
    """What a device makes of one tick."""

    send_x: list
    send_g: list
    sums: Sums


@dataclass(frozen=True)
class DeviceStep:
    """One device's arrays, at work on one micro-batch after the other."""

    stages: Stages
    trains: bool
    loss: Callable | None
    per_example: bool
    replicas: int
    params: list
    stats: list
    shared: dict  # tied parameters
    ids: jax.Array  # [V, longest stage]: global ids of its stages' layers
    batch: dict  # inputs [M, elements of a micro-batch], else leaves [M, B, ...]
    key: jax.Array
    progress: jax.Array

    def zero_sums(self, micro_batches: int) -> Sums:
        """What the sums start from."""
        trained = (self.params, self.shared, self.stats) if self.trains else ([], {}, [])
        shapes = jax.eval_shape(wide, trained)
        grads, shared, moments = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return Sums(grads, shared, moments, self._zero_result(micro_batches))

    def _zero_result(self, micro_batches: int) -> PyTree:
        output, lead = self.stages.geometry.shapes[-1].output, (micro_batches,)
        if self.loss is not None:
            first = jax.tree.map(lambda a: a[0], (self.batch["labels"], self.batch["weights"]))
            loss = functools.partial(weighted_sums, self.loss)
            output, lead = jax.eval_shape(loss, output, *first), ()
        return jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), output)

    def work(self, branch: Branch, kept: Kept, entry: Entry, work: Work) -> Work:
        """Run `branch` on the boundaries `kept`, and add to the sums of `work`."""
        if branch.stage is None:
            return work
        methods = {"forward": self._forward, "backward": self._backward, "evaluate": self._evaluate}
        return methods[branch.operation](branch.stage, kept, entry, work)

    def _forward(self, s: int, kept: Kept, entry: Entry, work: Work) -> Work:
        y, moments = self._stage(s, entry).forward(self._input(s, kept, entry))
        wire = self.stages.boundary_format
        return work._replace(
            send_x=wire.encode(jax.tree.leaves(y), wire.shapes),
            sums=self._with_moments(s, work.sums, moments),
        )

    def _evaluate(self, s: int, kept: Kept, entry: Entry, work: Work) -> Work:
        y, _ = self._stage(s, entry).forward(self._input(s, kept, entry))
        if self.loss is None:
            at_its_place = functools.partial(put, i=entry.micro_batch)
            result = jax.tree.map(at_its_place, work.sums.result, y.x)
        else:
            result = jax.tree.map(jnp.add, work.sums.result, self._loss(y.x, entry))
        return work._replace(sums=work.sums._replace(result=result))

    def _backward(self, s: int, kept: Kept, entry: Entry, work: Work) -> Work:
        """Recompute the stage from its input, and add its gradients to the sums.

        Skips that cross the stage are handed on, forward and backward, and take no part in it.
        """
        passing, (c, _) = self.stages.geometry.passing(s), self.stages.geometry.at(s)
        x, _ = _part(self._input(s, kept, entry), passing)
        if s == self.stages.geometry.last:
            passed, start = (
                {},
                functools.partial(start_of_backward, self.loss, *self._targets(entry)),
            )
        else:
            arrived, passed = _part(self._gradient(s, kept, entry), passing)
            start = lambda _: (jax.tree.leaves(arrived), None)  # noqa: E731
        sums = work.sums
        backward = self._stage(s, entry).backward
        back, moments, result = backward(x, start, sums.grads[c], sums.shared)
        grads = [back.params if i == c else g for i, g in enumerate(sums.grads)]
        sums = sums._replace(grads=grads, shared=back.shared)
        if s == self.stages.geometry.last:
            sums = sums._replace(result=jax.tree.map(jnp.add, sums.result, result))
            sums = self._with_moments(s, sums, moments)
        if s == 0:
            return work._replace(sums=sums)
        inner = with_floats(x, back.x, rest=lambda _: None)
        boundary = Boundary(inner.x, {**inner.skips, **passed})
        sent = self.stages.boundary_format.encode(jax.tree.leaves(boundary), self.gradient_shapes)
        return work._replace(send_g=sent, sums=sums)

    def _stage(self, s: int, entry: Entry) -> StageStep:
        c, _ = self.stages.geometry.at(s)
        examples = self.batch_rows if self.per_example else None
        micro_batch = entry.micro_batch * self.replicas + lax.axis_index(DATA)
        call = Call(self.key, micro_batch, examples, self.trains, self.progress)
        arrays = (self.params[c], self.stats[c], self.shared)
        return StageStep(self.stages, s, *arrays, self.ids[c], call)

    def _with_moments(self, s: int, sums: Sums, moments: list) -> Sums:
        """Each micro-batch's moments are added in one forward: that of a recomputation is not."""
        if not jax.tree.leaves(moments):
            return sums
        (c, k), all_chunks = self.stages.geometry.at(s), list(sums.moments)
        new = self.stages.stats[c].write(k, moments)
        all_chunks[c] = jax.tree.map(jnp.add, all_chunks[c], new)
        return sums._replace(moments=all_chunks)

    def _input(self, s: int, kept: Kept, entry: Entry) -> Boundary:
        if s == 0:
            one = lambda a, like: get(a, entry.micro_batch).reshape(like.shape)  # noqa: E731
            return Boundary(
                jax.tree.map(one, self.batch["inputs"], self.stages.geometry.input(0).x), {}
            )
        leaves, structure = jax.tree.flatten(self.stages.geometry.input(s))
        arrays = [get(a, entry.x) for a in kept.x]
        return jax.tree.unflatten(structure, self.stages.boundary_format.decode(arrays, leaves))

    def _gradient(self, s: int, kept: Kept, entry: Entry) -> Boundary:
        """The gradient of what stage s handed on; None in place of leaves that have none."""
        like = self.stages.geometry.input(s + 1)
        arrays = [get(a, entry.g) for a in kept.g]
        values = self.stages.boundary_format.decode(arrays, float_leaves(like))
        return with_floats(like, values, rest=lambda _: None)

    @property
    def gradient_shapes(self) -> list:
        """What goes back over a boundary; nothing if nothing is trained."""
        return self.stages.boundary_format.gradient_shapes if self.trains else []

    @property
    def batch_rows(self) -> int:
        """B."""
        return jax.tree.leaves(self.stages.geometry.input(0).x)[0].shape[0]

    def _loss(self, outputs: PyTree, entry: Entry) -> tuple:
        assert self.loss is not None  # nothing asks for a loss in a program of outputs
        return weighted_sums(self.loss, outputs, *self._targets(entry))

    def _targets(self, entry: Entry) -> tuple:
        """Labels and weights of a micro-batch."""
        targets = (self.batch["labels"], self.batch["weights"])
        return jax.tree.map(lambda a: get(a, entry.micro_batch), targets)


def _part(boundary: Boundary, passing: set[str]) -> tuple[Boundary, dict]:
    """What a stage computes with, and the skips that only cross it."""
    own = {name: a for name, a in boundary.skips.items() if name not in passing}
    passed = {name: a for name, a in boundary.skips.items() if name in passing}
    return Boundary(boundary.x, own), passed


def get(array: jax.Array, i: jax.Array) -> jax.Array:
    """Element i of the first axis."""
    return lax.dynamic_index_in_dim(array, i, 0, keepdims=False)


def put(array: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    """The array with `value` as element i of the first axis."""
    return lax.dynamic_update_index_in_dim(array, value, i, 0)
