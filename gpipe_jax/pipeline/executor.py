"""Execute any schedule table in one program: a `shard_map` over devices, a `scan` over ticks.

A tick of device k. The lowered table (`schedules.buffers`) gives it a micro-batch m, the slots to
store what arrived, the slots to read, and a branch:

       from device k - 1                                     from device k + 1
          arrived_x                                             arrived_g
              |                                                     |
    store     +-> buffers.x[receive_x]       buffers.g[receive_g] <-+
                        |                              |
    work      forward   x = buffers.x[x_slot]          |
                        y = stage(x) ---------------------------------> send_x
              backward  x = buffers.x[x_slot], g = buffers.g[g_slot]
                        dx, dw = vjp(stage, x)(g) --------------------> send_g
                        sums += dw
              evaluate  sums += loss(stage(x)): the last stage of a forward-only schedule
              idle      compute nothing; send a constant that nobody reads
                        |                              |
    send      send_x to device k + 1         send_g to device k - 1

The receivers find these as `arrived_x` and `arrived_g` in the next tick. `device_step` has the
branches. After the last tick one all-reduce sums the gradients over the replicas, and each stage
commits its running statistics once, from the moments of its forwards only.

Letters: K devices, M micro-batches, B examples of a micro-batch on one replica, t tick, k device,
s stage.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.distributed.mesh import (
    BATCH_SPEC,
    PARAMS_SPEC,
    REPLICATED_SPEC,
    MeshLike,
    device_index,
    num_replicas,
    permute_stages,
    sum_over_all,
    sum_over_replicas,
    sum_over_stages,
)
from gpipe_jax.losses.weighting import HasCount, with_counts
from gpipe_jax.pipeline.device_step import (
    IDLE,
    Branch,
    Buffers,
    DeviceStep,
    Entry,
    Sums,
    TickResult,
    get,
    put,
)
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import from_block, to_block
from gpipe_jax.pipeline.spmd import of_own_stage, on_every_device
from gpipe_jax.schedules.buffers import BufferTable, lower
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.utils.trees import PyTree, differentiable
from gpipe_jax.utils.xla_workarounds import flat_examples, ring, run_branch


class Variables(NamedTuple):
    """Hold what a step reads beside the batch."""

    params: list  # the trained parameters of each chunk, in the form of its `Storage`
    stats: list  # the running statistics of each chunk, likewise
    fixed: list  # frozen parameters and constants of each chunk, likewise
    key: jax.Array  # random key of the step
    progress: jax.Array  # fraction of the training run that is done, 0 to 1


class Carry(NamedTuple):
    """Hold what a device keeps from one tick to the next."""

    arrived_x: list  # the encoded boundary that the previous stage sent in the last tick
    arrived_g: list  # the encoded gradient that the next stage sent in the last tick
    buffers: Buffers
    sums: Sums


def build(
    stages: Stages,
    schedule: Schedule,
    mesh: MeshLike,
    loss: Callable | None,
    *,
    keys_per: str = "micro_batch",
    extras_gradients: Sequence[str] = (),
    idle_fill: float = 0.0,
) -> Callable:
    """Return the function (variables, batch) that runs `schedule`; to be traced.

    The batch has leaves [M, D*B, ...] and weights that sum to one. With backwards in the schedule
    the result is ((loss, metrics), grads, stats, gradients of the extras that are named). For a
    forward-only schedule it is (loss, metrics), or the outputs if `loss` is None.

    Buffers hold `idle_fill` until something arrives, and idle devices send it. A test sets it to
    NaN to show that it is never used.
    """
    lowered = lower(schedule)
    trains = bool((schedule.table[..., 0] == BACKWARD).any())

    def body(variables: Variables, ids: jax.Array, batch: dict) -> PyTree:
        params, stats, fixed = (
            [from_block(arrays) for arrays in chunks]
            for chunks in (variables.params, variables.stats, variables.fixed)
        )
        device = DeviceStep(
            stages=stages,
            trains=trains,
            loss=loss,
            per_example=keys_per == "example",
            replicas=num_replicas(mesh),
            params=params,
            stats=stats,
            fixed=fixed,
            shared=stages.ties.gather(params) | stages.frozen_ties.gather(fixed),
            ids=ids[0],
            batch={
                **_with_counts(batch, loss),
                "inputs": jax.tree.map(flat_examples, batch["inputs"]),
                "extras": jax.tree.map(flat_examples, batch["extras"]),
            },
            key=variables.key,
            progress=variables.progress,
            extras_gradients=tuple(extras_gradients),
        )
        return _Ticks(device, schedule, lowered, idle_fill).run()

    divided: Any = PARAMS_SPEC
    replicated: Any = REPLICATED_SPEC
    variables = Variables(divided, divided, divided, key=replicated, progress=replicated)
    in_specs = (variables, PARAMS_SPEC, BATCH_SPEC)
    result_spec = BATCH_SPEC if loss is None else REPLICATED_SPEC
    out_specs = (result_spec, PARAMS_SPEC, PARAMS_SPEC, BATCH_SPEC) if trains else result_spec
    mapped = on_every_device(body, mesh, in_specs, out_specs)
    ids: Any = stages.geometry.layer_ids()
    return lambda variables, batch: mapped(variables, ids, batch)


def _with_counts(batch: dict, loss: Callable | None) -> dict:
    """Return a replica's batch with weights that sum to one with the counts of the loss."""
    if not isinstance(loss, HasCount):
        return batch
    targets = batch["labels"], batch["weights"]
    labels, weights = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), targets)
    weights = with_counts(loss, labels, weights, sum_over_replicas)
    return {**batch, "weights": weights.reshape(batch["weights"].shape)}


@dataclass(frozen=True)
class _Ticks:
    """Run all ticks of a device, then sum over the devices."""

    device: DeviceStep
    schedule: Schedule
    lowered: BufferTable
    fill: float

    def run(self) -> PyTree:
        """Run the ticks segment by segment, and return the result of the step."""
        carry, low = self._start(), self.lowered
        columns = (low.micro_batch, low.receive_x, low.receive_g, low.x_slot, low.g_slot)
        for ticks in self._segments():
            branches = [self._branches[t] for t in ticks]
            different = sorted({branch for row in branches for branch in row}, key=str)
            index = [[different.index(branch) for branch in row] for row in branches]
            table = np.stack([*(column[ticks] for column in columns), index], axis=-1)
            tick = functools.partial(self._tick, different)
            carry, _ = lax.scan(tick, carry, jnp.asarray(table, jnp.int32))
        return self._finish(carry.sums)

    # --- buffers ---------------------------------------------------------------------------------

    def _start(self) -> Carry:
        x_shapes, g_shapes = self.device.boundary_shapes, self.device.gradient_shapes
        return Carry(
            arrived_x=[self._filled(a) for a in x_shapes],
            arrived_g=[self._filled(a) for a in g_shapes],
            buffers=Buffers(
                x=[self._filled(a, self.lowered.x_slots) for a in x_shapes],
                g=[self._filled(a, self.lowered.g_slots) for a in g_shapes],
            ),
            sums=self.device.zero_sums(self.schedule.micro_batches),
        )

    def _filled(self, shape: jax.ShapeDtypeStruct, *leading: int) -> jax.Array:
        fill = self.fill if differentiable(shape) else 0
        return jnp.full((*leading, *shape.shape), fill, shape.dtype)

    def _finish(self, sums: Sums) -> PyTree:
        if self.device.loss is None:
            return sum_over_stages(sums.result)
        result = sum_over_all(sums.result)
        if not self.device.trains:
            return result
        grads = self.device.stages.ties.add(sums.grads, sums.shared)
        grads, moments = sum_over_replicas((grads, sums.moments))
        stats = self._committed(moments)
        grads, stats = ([to_block(arrays) for arrays in chunks] for chunks in (grads, stats))
        return result, grads, stats, sum_over_stages(sums.extras)

    def _committed(self, moments: list) -> list:
        """Return the running statistics after this step, from the sums of all moments."""
        if not jax.tree.leaves(moments):
            return self.device.stats
        count = self.schedule.micro_batches * self.device.replicas
        mean = jax.tree.map(lambda a: a / count, moments)

        stages = self.device.stages

        def commit(s: int) -> dict:
            c, _ = stages.geometry.at(s)
            return stages.commit(s, self.device.stats[c], mean[c])

        return [of_own_stage(stages, c, commit) for c in range(stages.geometry.chunks)]

    # --- the table -------------------------------------------------------------------------------

    def _segments(self) -> list[np.ndarray]:
        """Return the ticks before the first backward, after the last forward, and between.

        Each segment is a scan, so a stretch of forwards has no backward code and sends no
        gradients. Ticks without work are left out: with one stage these are all forwards, because
        its backwards compute them.
        """
        operation = self.schedule.table[..., 0]
        forward = np.nonzero((operation == FORWARD).any(axis=1))[0]
        backward = np.nonzero((operation == BACKWARD).any(axis=1))[0]
        first_backward = int(backward[0]) if len(backward) else len(operation)
        end_of_forwards = max(int(forward[-1]) + 1, first_backward)
        arrives = (self.lowered.receive_x >= 0) | (self.lowered.receive_g >= 0)
        works: Any = np.array([[branch != IDLE for branch in row] for row in self._branches])
        busy = (works | arrives).any(axis=1)
        cuts = (
            [first_backward, end_of_forwards]
            if len(self.device.stages.geometry.layer_ranges) > 1
            else []
        )
        segments = np.split(np.arange(len(operation)), cuts)
        return [ticks[busy[ticks]] for ticks in segments if busy[ticks].any()]

    @functools.cached_property
    def _branches(self) -> list[list[Branch]]:
        """Return the branch of each entry of the table, [T][K]."""
        return [
            [self._branch(operation, chunk, k) for k, (operation, _, chunk) in enumerate(row)]
            for row in self.schedule.table.tolist()
        ]

    def _branch(self, operation: int, chunk: int, k: int) -> Branch:
        stages = self.device.stages
        s = chunk * stages.geometry.num_devices + k
        if operation == BACKWARD:
            return Branch("backward", stages.representatives[s])
        if operation == FORWARD and s < stages.geometry.last:
            return Branch("forward", stages.representatives[s])
        if operation == FORWARD and not self.device.trains:
            return Branch("evaluate", stages.representatives[s])
        # In training the last stage's backward computes its forward, loss and gradient.
        return IDLE

    def _tick(self, branches: list[Branch], carry: Carry, row: jax.Array) -> tuple[Carry, None]:
        """Run one tick; `row` [K, 6] is the lowered table's, its last column a branch's index."""
        m, receive_x, receive_g, x_slot, g_slot, index = row[device_index()]
        buffers = Buffers(
            x=_store(carry.buffers.x, carry.arrived_x, receive_x),
            g=_store(carry.buffers.g, carry.arrived_g, receive_g),
        )
        idle = TickResult(
            send_x=[self._filled(a) for a in self.device.boundary_shapes],
            send_g=[self._filled(a) for a in self.device.gradient_shapes],
            sums=carry.sums,
        )
        entry = Entry(m, x_slot, g_slot)
        runs = [functools.partial(self.device.run, branch, buffers, entry) for branch in branches]
        result = run_branch(index, runs, idle)
        carry = carry._replace(buffers=buffers, sums=result.sums)
        geometry = self.device.stages.geometry
        down = ring(geometry.num_devices, closed=geometry.chunks > 1)
        if any(branch.operation == "forward" for branch in branches):
            carry = carry._replace(arrived_x=_permute(result.send_x, down))
        if any(branch.operation == "backward" for branch in branches):
            up = [(after, before) for before, after in down]
            carry = carry._replace(arrived_g=_permute(result.send_g, up))
        return carry, None


def _store(buffers: list, arrived: list, slot: jax.Array) -> list:
    """Put what arrived into `slot` of each buffer; change nothing if `slot` is -1."""
    i = jnp.maximum(slot, 0)
    return [
        put(buffer, jnp.where(slot >= 0, value, get(buffer, i)), i)
        for buffer, value in zip(buffers, arrived, strict=True)
    ]


def _permute(arrays: list, pairs: list) -> list:
    return [permute_stages(a, pairs) for a in arrays]
