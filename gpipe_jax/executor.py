"""One program that executes any schedule table: a `shard_map` over all devices, a scan over ticks.

At each tick a device stores what has arrived, does what the table says (an idle device computes
nothing), and passes its results to its neighbours with one permute each way. A backward recomputes
its stage from the stashed input (GPipe, section 2.3) and adds its parameters' gradients, in
float32, to what it has: see `composite`. After the last tick the gradients are summed over the data
replicas, once, and the running statistics are committed, from forwards only, once.

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
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from gpipe_jax.composite import Call, Composite, start_of_backward
from gpipe_jax.gradients import float_leaves, with_floats
from gpipe_jax.layers.links import Boundary
from gpipe_jax.layers.shapes import differentiable
from gpipe_jax.losses import weighted_sums
from gpipe_jax.mesh import DATA, STAGE
from gpipe_jax.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.slots import Rows, lower
from gpipe_jax.stages import Stages
from gpipe_jax.storage import Storage, from_block, to_block

PyTree = Any


class Variables(NamedTuple):
    """What a step reads beside the batch."""

    params: list  # of each chunk, in the form of its `Storage`
    stats: list  # running statistics, likewise
    key: jax.Array  # of the step
    progress: jax.Array  # of the training run, 0 to 1


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


class Carry(NamedTuple):
    """What a device keeps from one tick to the next."""

    arrived_x: list  # wire arrays from the previous stage's last tick
    arrived_g: list  # wire arrays (gradients) from the next stage's last tick
    stash: list  # [slots, *wire]: boundary inputs until their last use
    gradients: list  # [slots, *wire]: boundary gradients until they are used
    sums: Sums


class Work(NamedTuple):
    """What a device makes of one tick."""

    send_x: list
    send_g: list
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
        device = _Device(
            stages=stages,
            schedule=schedule,
            rows=rows,
            trains=trains,
            loss=loss,
            per_example=keys_per == "example",
            fill=idle_fill,
            replicas=mesh.shape[DATA],
            params=here(variables.params),
            stats=here(variables.stats),
            shared=stages.gather_shared(here(variables.params)),
            ids=ids[0],
            batch=batch,
            key=variables.key,
            progress=variables.progress,
        )
        return device.run()

    in_specs = (Variables(P(STAGE), P(STAGE), P(), P()), P(STAGE), P(None, DATA))  # type: ignore[arg-type]
    result_spec = P(None, DATA) if loss is None else P()
    out_specs = (result_spec, P(STAGE), P(STAGE)) if trains else result_spec
    mapped = _on_every_device(body, mesh, in_specs, out_specs)
    ids: Any = stages.layer_ids()
    return lambda variables, batch: mapped(variables, ids, batch)


def _on_every_device(
    body: Callable, mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable:
    """`jax.shard_map` over all axes, without its check of which values differ between devices.

    The check would refuse any layer with a loop that starts from a constant (`nnx.RNN`), because
    the constant does not differ and the loop's result does. Nothing here relies on it: gradients
    are taken within a device, and the sums over devices are written out in `_finish`.
    """
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def build_arrays(
    stages: Stages, storages: Sequence[Storage], mesh: Mesh | AbstractMesh, make: Callable
) -> list[PyTree]:
    """Traced: the rectangular form of what `make(shape, layer id)` returns for each layer.

    Every device makes its own stages' layers and no others; see `Stages.build`.
    """

    def body(ids: jax.Array) -> list:
        build = lambda s: stages.build(storages, s, ids[0], make)  # noqa: E731
        chunks = [_by_device(stages, c, build) for c in range(stages.chunks)]
        return [to_block(arrays) for arrays in chunks]

    mapped = _on_every_device(body, mesh, P(STAGE), P(STAGE))
    return mapped(jnp.asarray(stages.layer_ids()))


def _by_device(stages: Stages, chunk: int, function: Callable[[int], PyTree]) -> PyTree:
    """Traced, on every device: `function(s)` of the device's own stage s in this chunk."""
    K = stages.devices
    kinds = stages.kind[chunk * K : (chunk + 1) * K]
    known = sorted(set(kinds))
    branch = jnp.asarray([known.index(kind) for kind in kinds])[lax.axis_index(STAGE)]
    return lax.switch(branch, [functools.partial(function, s) for s in known])


@dataclass(frozen=True)
class _Device:
    """The program of one device, for all of them; arrays are the device's own."""

    stages: Stages
    schedule: Schedule
    rows: Rows
    trains: bool
    loss: Callable | None
    per_example: bool
    fill: float
    replicas: int
    params: list
    stats: list
    shared: dict  # tied parameters
    ids: jax.Array  # [V, longest stage]: global ids of its stages' layers
    batch: dict  # leaves [M, B, ...]
    key: jax.Array
    progress: jax.Array

    def run(self) -> PyTree:
        """All ticks, segment by segment, and the sums over devices after them."""
        carry = self._start()
        columns = self.rows[1:6]
        for ticks in self._segments():
            names = self._names()[ticks]
            known = sorted(set(names.ravel().tolist()))
            branch = np.searchsorted(known, names)
            table = np.stack([*(column[ticks] for column in columns), branch], axis=-1)
            tick = functools.partial(self._tick, known)
            carry, _ = lax.scan(tick, carry, jnp.asarray(table, jnp.int32))
        return self._finish(carry.sums)

    # --- buffers ---------------------------------------------------------------------------------

    def _start(self) -> Carry:
        wire, back = self.stages.wire.shapes, self._gradient_shapes()
        return Carry(
            arrived_x=[self._filled(s) for s in wire],
            arrived_g=[self._filled(s) for s in back],
            stash=[self._filled(s, self.rows.x_slots) for s in wire],
            gradients=[self._filled(s, self.rows.g_slots) for s in back],
            sums=self._zero_sums(),
        )

    def _gradient_shapes(self) -> list:
        return self.stages.wire.gradient_shapes if self.trains else []

    def _filled(self, spec: jax.ShapeDtypeStruct, *lead: int) -> jax.Array:
        fill = self.fill if differentiable(spec) else 0
        return jnp.full((*lead, *spec.shape), fill, spec.dtype)

    def _zero_sums(self) -> Sums:
        trained = (self.params, self.shared, self.stats) if self.trains else ([], {}, [])
        grads, shared, moments = jax.tree.map(
            lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), trained
        )
        return Sums(grads, shared, moments, self._zero_result())

    def _zero_result(self) -> PyTree:
        output = self.stages.shapes[-1].output
        if self.loss is None:
            M = self.schedule.micro_batches
            return jax.tree.map(lambda a: jnp.zeros((M, *a.shape), a.dtype), output)
        first = jax.tree.map(lambda a: a[0], (self.batch["labels"], self.batch["weights"]))
        loss = functools.partial(weighted_sums, self.loss)
        return jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(loss, output, *first)
        )

    def _finish(self, sums: Sums) -> PyTree:
        if self.loss is None:
            return lax.psum(sums.result, STAGE)
        result = lax.psum(sums.result, (STAGE, DATA))
        if not self.trains:
            return result
        grads = self.stages.add_shared(sums.grads, sums.shared)
        grads, moments = lax.psum((grads, sums.moments), DATA)
        stats = self._committed(moments)
        grads, stats = ([to_block(arrays) for arrays in chunks] for chunks in (grads, stats))
        return result, grads, stats

    def _committed(self, moments: list) -> list:
        """The running statistics after this step, from the sums of its micro-batches' moments."""
        if not jax.tree.leaves(moments):
            return self.stats
        count = self.schedule.micro_batches * self.replicas
        mean = jax.tree.map(lambda a: a / count, moments)

        def commit(s: int) -> dict:
            c, _ = self.stages.at(s)
            return self.stages.commit(s, self.stats[c], mean[c])

        return [_by_device(self.stages, c, commit) for c in range(self.stages.chunks)]

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
        busy = ((self._names() != "idle") | arrives).any(axis=1)
        cuts = [first_b, last_f] if len(self.stages.cuts) > 1 else []
        segments = np.split(np.arange(len(operation)), cuts)
        return [ticks[busy[ticks]] for ticks in segments if busy[ticks].any()]

    def _names(self) -> np.ndarray:
        """[T, K]: the branch that does each slot of the table, as "operation stage"."""
        operation, _, chunk = np.moveaxis(self.schedule.table, -1, 0)
        stage = chunk * self.stages.devices + np.arange(self.stages.devices)
        names = np.full(operation.shape, "idle", dtype="U32")
        for s, kind in enumerate(self.stages.kind):
            forward = f"forward {kind}"
            if s == self.stages.last:
                # In training the last stage's backward computes its forward, loss and gradient.
                forward = "idle" if self.trains else f"evaluate {kind}"
            names[(operation == FORWARD) & (stage == s)] = forward
            names[(operation == BACKWARD) & (stage == s)] = f"backward {kind}"
        return names

    def _tick(self, known: list[str], carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        m, receive_x, receive_g, x_slot, g_slot, branch = rows[lax.axis_index(STAGE)]
        carry = carry._replace(
            stash=_store(carry.stash, carry.arrived_x, receive_x),
            gradients=_store(carry.gradients, carry.arrived_g, receive_g),
        )
        work = Work(
            send_x=[self._filled(s) for s in self.stages.wire.shapes],
            send_g=[self._filled(s) for s in self._gradient_shapes()],
            sums=carry.sums,
        )
        # A conditional for each, not one switch: then XLA adds to the sums in place on TPU, where
        # it copies what passes through a switch (1.5 GiB for 2.7 GiB of gradients on v3).
        for n, name in enumerate(known):
            one = functools.partial(self._work, name, carry, Entry(m, x_slot, g_slot))
            work = lax.cond(branch == n, one, lambda w: w, work) if len(known) > 1 else one(work)
        carry = carry._replace(sums=work.sums)
        if any(name.startswith("forward") for name in known):
            carry = carry._replace(arrived_x=_permute(work.send_x, self._neighbours()))
        if any(name.startswith("backward") for name in known):
            up = [(b, a) for a, b in self._neighbours()]
            carry = carry._replace(arrived_g=_permute(work.send_g, up))
        return carry, None

    def _neighbours(self) -> list[tuple[int, int]]:
        """(device, next device). Closed to a ring only if chunks need it.

        XLA has mis-compiled permutes of several rings on GPU (issue 45222).
        """
        K = self.stages.devices
        around = [(K - 1, 0)] if self.stages.chunks > 1 else []
        return [(k, k + 1) for k in range(K - 1)] + around

    # --- one operation on one micro-batch --------------------------------------------------------

    def _work(self, name: str, carry: Carry, entry: Entry, work: Work) -> Work:
        """The branch `name`, on the buffers of `carry`; adds to the sums of `work`."""
        operation, _, stage = name.partition(" ")
        if operation == "idle":
            return work
        method = {"forward": self._forward, "backward": self._backward, "evaluate": self._evaluate}
        return method[operation](int(stage), carry, entry, work)

    def _forward(self, s: int, carry: Carry, entry: Entry, work: Work) -> Work:
        y, moments = self._stage(s, entry).forward(self._input(s, carry, entry))
        wire = self.stages.wire
        return work._replace(
            send_x=wire.encode(jax.tree.leaves(y), wire.shapes),
            sums=self._with_moments(s, work.sums, moments),
        )

    def _evaluate(self, s: int, carry: Carry, entry: Entry, work: Work) -> Work:
        y, _ = self._stage(s, entry).forward(self._input(s, carry, entry))
        if self.loss is None:
            put = lambda a, b: _put(a, b, entry.micro_batch)  # noqa: E731
            result = jax.tree.map(put, work.sums.result, y.x)
        else:
            result = jax.tree.map(jnp.add, work.sums.result, self._loss(y.x, entry))
        return work._replace(sums=work.sums._replace(result=result))

    def _backward(self, s: int, carry: Carry, entry: Entry, work: Work) -> Work:
        """Recompute the stage from its input, and add its gradients to the sums.

        Skips that cross the stage are handed on, forward and backward, and take no part in it.
        """
        passing, (c, _) = self.stages.passing(s), self.stages.at(s)
        x, _ = _part(self._input(s, carry, entry), passing)
        if s == self.stages.last:
            passed, start = (
                {},
                functools.partial(start_of_backward, self.loss, *self._targets(entry)),
            )
        else:
            arrived, passed = _part(self._gradient(s, carry, entry), passing)
            start = lambda _: (jax.tree.leaves(arrived), None)  # noqa: E731
        sums = work.sums
        backward = self._stage(s, entry).backward
        back, moments, result = backward(x, start, sums.grads[c], sums.shared)
        grads = [back.params if i == c else g for i, g in enumerate(sums.grads)]
        sums = sums._replace(grads=grads, shared=back.shared)
        if s == self.stages.last:
            sums = sums._replace(result=jax.tree.map(jnp.add, sums.result, result))
            sums = self._with_moments(s, sums, moments)
        if s == 0:
            return work._replace(sums=sums)
        inner = with_floats(x, back.x, rest=lambda _: None)
        boundary = Boundary(inner.x, {**inner.skips, **passed})
        sent = self.stages.wire.encode(jax.tree.leaves(boundary), self._gradient_shapes())
        return work._replace(send_g=sent, sums=sums)

    def _stage(self, s: int, entry: Entry) -> Composite:
        c, _ = self.stages.at(s)
        examples = self.batch_rows if self.per_example else None
        micro_batch = entry.micro_batch * self.replicas + lax.axis_index(DATA)
        call = Call(self.key, micro_batch, examples, self.trains, self.progress)
        arrays = (self.params[c], self.stats[c], self.shared)
        return Composite(self.stages, s, *arrays, self.ids[c], call)

    def _with_moments(self, s: int, sums: Sums, moments: list) -> Sums:
        """Each micro-batch's moments are added in one forward: that of a recomputation is not."""
        if not jax.tree.leaves(moments):
            return sums
        (c, k), all_chunks = self.stages.at(s), list(sums.moments)
        new = self.stages.stats[c].write(k, moments)
        all_chunks[c] = jax.tree.map(jnp.add, all_chunks[c], new)
        return sums._replace(moments=all_chunks)

    def _input(self, s: int, carry: Carry, entry: Entry) -> Boundary:
        if s == 0:
            x = jax.tree.map(lambda a: _get(a, entry.micro_batch), self.batch["inputs"])
            return Boundary(x, {})
        leaves, structure = jax.tree.flatten(self.stages.input(s))
        arrays = [_get(a, entry.x) for a in carry.stash]
        return jax.tree.unflatten(structure, self.stages.wire.decode(arrays, leaves))

    def _gradient(self, s: int, carry: Carry, entry: Entry) -> Boundary:
        """The gradient of what stage s handed on; None in place of leaves that have none."""
        like = self.stages.input(s + 1)
        arrays = [_get(a, entry.g) for a in carry.gradients]
        values = self.stages.wire.decode(arrays, float_leaves(like))
        return with_floats(like, values, rest=lambda _: None)

    @property
    def batch_rows(self) -> int:
        """B."""
        return jax.tree.leaves(self.batch["inputs"])[0].shape[1]

    def _loss(self, outputs: PyTree, entry: Entry) -> tuple:
        assert self.loss is not None  # nothing asks for a loss in a program of outputs
        return weighted_sums(self.loss, outputs, *self._targets(entry))

    def _targets(self, entry: Entry) -> tuple:
        """Labels and weights of a micro-batch."""
        targets = (self.batch["labels"], self.batch["weights"])
        return jax.tree.map(lambda a: _get(a, entry.micro_batch), targets)


def _part(boundary: Boundary, passing: set[str]) -> tuple[Boundary, dict]:
    """What a stage computes with, and the skips that only cross it."""
    own = {name: a for name, a in boundary.skips.items() if name not in passing}
    passed = {name: a for name, a in boundary.skips.items() if name in passing}
    return Boundary(boundary.x, own), passed


def _store(buffers: list, arrived: list, slot: jax.Array) -> list:
    """Put what arrived into `slot` of each buffer; nothing if `slot` is -1."""
    at = jnp.maximum(slot, 0)
    return [
        _put(b, jnp.where(slot >= 0, a, _get(b, at)), at)
        for b, a in zip(buffers, arrived, strict=True)
    ]


def _get(array: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, i, 0, keepdims=False)


def _put(array: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, value, i, 0)


def _permute(arrays: list, pairs: list) -> list:
    return [lax.ppermute(a, STAGE, pairs) for a in arrays]
