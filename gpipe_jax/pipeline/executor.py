"""One program that executes any schedule table: a `shard_map` over all devices, a scan over ticks.

At each tick a device stores what has arrived, does what the table says (an idle device computes
nothing; see `device`), and passes its results to its neighbours with one permute each way. After
the last tick the gradients are summed over the data replicas, once, and the running statistics are
committed, from forwards only, once.

Letters: K devices, M micro-batches, B examples of a micro-batch on one replica, t tick, k device,
s stage.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from gpipe_jax.distributed.mesh import DATA, STAGE
from gpipe_jax.pipeline.device_step import (
    IDLE,
    Branch,
    DeviceStep,
    Entry,
    Kept,
    Sums,
    Work,
    get,
    put,
)
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import from_block, to_block
from gpipe_jax.pipeline.spmd import of_own_stage, on_every_device
from gpipe_jax.schedules.buffers import BufferTable, lower
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.utils.trees import PyTree, differentiable


class Variables(NamedTuple):
    """What a step reads beside the batch."""

    params: list  # of each chunk, in the form of its `Storage`
    stats: list  # running statistics, likewise
    key: jax.Array  # of the step
    progress: jax.Array  # of the training run, 0 to 1


class Carry(NamedTuple):
    """What a device keeps from one tick to the next."""

    arrived_x: list  # wire arrays from the previous stage's last tick
    arrived_g: list  # wire arrays (gradients) from the next stage's last tick
    kept: Kept
    sums: Sums


def build(
    stages: Stages,
    schedule: Schedule,
    mesh: Mesh | AbstractMesh,
    loss: Callable | None,
    *,
    keys_per: str = "micro_batch",
    idle_fill: float = 0.0,
) -> Callable:
    """The traced function (variables, batch) that runs `schedule`.

    `batch` has leaves [M, D*B, ...] with weights that sum to one. Returns, for a schedule with
    backwards, ((loss, metrics), grads, stats); for a forward-only one (loss, metrics), or without
    `loss` the outputs. `idle_fill` is what buffers hold before anything arrives and what idle
    devices send: a test sets it to NaN to show that none of it is ever used.
    """
    rows = lower(schedule)
    trains = bool((schedule.table[..., 0] == BACKWARD).any())

    def body(variables: Variables, ids: jax.Array, batch: dict) -> PyTree:
        here = lambda chunks: [from_block(arrays) for arrays in chunks]  # noqa: E731
        device = DeviceStep(
            stages=stages,
            trains=trains,
            loss=loss,
            per_example=keys_per == "example",
            replicas=mesh.shape[DATA],
            params=here(variables.params),
            stats=here(variables.stats),
            shared=stages.ties.gather(here(variables.params)),
            ids=ids[0],
            batch={**batch, "inputs": jax.tree.map(_flat, batch["inputs"])},
            key=variables.key,
            progress=variables.progress,
        )
        return _Ticks(device, schedule, rows, idle_fill).run()

    in_specs = (Variables(P(STAGE), P(STAGE), P(), P()), P(STAGE), P(None, DATA))  # type: ignore[arg-type]
    result_spec = P(None, DATA) if loss is None else P()
    out_specs = (result_spec, P(STAGE), P(STAGE)) if trains else result_spec
    mapped = on_every_device(body, mesh, in_specs, out_specs)
    ids: Any = stages.geometry.layer_ids()
    return lambda variables, batch: mapped(variables, ids, batch)


def _flat(a: jax.Array) -> jax.Array:
    """All micro-batches of one input, [M, elements of a micro-batch].

    An array that a loop takes slices of gets the layout that the slices' user prefers: on TPU a
    convolution's made 3 GiB of 77 MB of images, twice. A reshape within the loop ends that.
    """
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))


@dataclass(frozen=True)
class _Ticks:
    """All ticks of a device, and the sums over devices after them."""

    device: DeviceStep
    schedule: Schedule
    rows: BufferTable
    fill: float

    def run(self) -> PyTree:
        """All ticks, segment by segment, and the sums over devices after them."""
        carry = self._start()
        rows = self.rows
        columns = (rows.micro_batch, rows.receive_x, rows.receive_g, rows.x_slot, rows.g_slot)
        for ticks in self._segments():
            branches = [self._branches[t] for t in ticks]
            known = sorted({branch for row in branches for branch in row}, key=str)
            index = [[known.index(branch) for branch in row] for row in branches]
            table = np.stack([*(column[ticks] for column in columns), index], axis=-1)
            tick = functools.partial(self._tick, known)
            carry, _ = lax.scan(tick, carry, jnp.asarray(table, jnp.int32))
        return self._finish(carry.sums)

    # --- buffers ---------------------------------------------------------------------------------

    def _start(self) -> Carry:
        wire, back = self.device.stages.boundary_format.shapes, self.device.gradient_shapes
        return Carry(
            arrived_x=[self._filled(s) for s in wire],
            arrived_g=[self._filled(s) for s in back],
            kept=Kept(
                x=[self._filled(s, self.rows.x_slots) for s in wire],
                g=[self._filled(s, self.rows.g_slots) for s in back],
            ),
            sums=self.device.zero_sums(self.schedule.micro_batches),
        )

    def _filled(self, spec: jax.ShapeDtypeStruct, *lead: int) -> jax.Array:
        fill = self.fill if differentiable(spec) else 0
        return jnp.full((*lead, *spec.shape), fill, spec.dtype)

    def _finish(self, sums: Sums) -> PyTree:
        if self.device.loss is None:
            return lax.psum(sums.result, STAGE)
        result = lax.psum(sums.result, (STAGE, DATA))
        if not self.device.trains:
            return result
        grads = self.device.stages.ties.add(sums.grads, sums.shared)
        grads, moments = lax.psum((grads, sums.moments), DATA)
        stats = self._committed(moments)
        grads, stats = ([to_block(arrays) for arrays in chunks] for chunks in (grads, stats))
        return result, grads, stats

    def _committed(self, moments: list) -> list:
        """The running statistics after this step, from the sums of its micro-batches' moments."""
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
        """The ticks before the first backward, those after the last forward, and those between.

        So a stretch of forwards carries no backward code and no gradient traffic. Ticks at which
        nothing happens are left out: with one stage all forwards, as backwards compute them.
        """
        operation = self.schedule.table[..., 0]
        forward = np.nonzero((operation == FORWARD).any(axis=1))[0]
        backward = np.nonzero((operation == BACKWARD).any(axis=1))[0]
        first_b = int(backward[0]) if len(backward) else len(operation)
        last_f = max(int(forward[-1]) + 1, first_b)
        arrives = (self.rows.receive_x >= 0) | (self.rows.receive_g >= 0)
        works = [[branch != IDLE for branch in row] for row in self._branches]
        busy: np.ndarray = (np.array(works) | arrives).any(axis=1)
        cuts = [first_b, last_f] if len(self.device.stages.geometry.layer_ranges) > 1 else []
        segments = np.split(np.arange(len(operation)), cuts)
        return [ticks[busy[ticks]] for ticks in segments if busy[ticks].any()]

    @functools.cached_property
    def _branches(self) -> list[list[Branch]]:
        """[T][K]: the branch for each entry of the table."""
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

    def _tick(self, known: list[Branch], carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        m, receive_x, receive_g, x_slot, g_slot, index = rows[lax.axis_index(STAGE)]
        kept = Kept(
            x=_store(carry.kept.x, carry.arrived_x, receive_x),
            g=_store(carry.kept.g, carry.arrived_g, receive_g),
        )
        work = Work(
            send_x=[self._filled(s) for s in self.device.stages.boundary_format.shapes],
            send_g=[self._filled(s) for s in self.device.gradient_shapes],
            sums=carry.sums,
        )
        # A conditional for each, not one switch: then XLA adds to the sums in place on TPU, where
        # it copies what passes through a switch (1.5 GiB for 2.7 GiB of gradients on v3).
        entry = Entry(m, x_slot, g_slot)
        for n, branch in enumerate(known):
            run = functools.partial(self.device.work, branch, kept, entry)
            work = lax.cond(index == n, run, lambda w: w, work) if len(known) > 1 else run(work)
        carry = carry._replace(kept=kept, sums=work.sums)
        if any(branch.operation == "forward" for branch in known):
            carry = carry._replace(arrived_x=_permute(work.send_x, self._neighbours()))
        if any(branch.operation == "backward" for branch in known):
            up = [(b, a) for a, b in self._neighbours()]
            carry = carry._replace(arrived_g=_permute(work.send_g, up))
        return carry, None

    def _neighbours(self) -> list[tuple[int, int]]:
        """(device, next device). Closed to a ring only if chunks need it.

        XLA has mis-compiled permutes of several rings on GPU (issue 45222).
        """
        K = self.device.stages.geometry.num_devices
        around = [(K - 1, 0)] if self.device.stages.geometry.chunks > 1 else []
        return [(k, k + 1) for k in range(K - 1)] + around


def _store(buffers: list, arrived: list, slot: jax.Array) -> list:
    """Put what arrived into `slot` of each buffer; nothing if `slot` is -1."""
    at = jnp.maximum(slot, 0)
    return [
        put(b, jnp.where(slot >= 0, a, get(b, at)), at)
        for b, a in zip(buffers, arrived, strict=True)
    ]


def _permute(arrays: list, pairs: list) -> list:
    return [lax.ppermute(a, STAGE, pairs) for a in arrays]
