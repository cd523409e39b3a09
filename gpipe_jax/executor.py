"""One program that executes any schedule table: a `shard_map` over all devices, a scan over ticks.

At each tick a device stores what has arrived, does what the table says (a branch: an idle device
computes nothing), and passes its results to its neighbours with one permute each way. The backward
branch recomputes its stage from the stashed input (GPipe, section 2.3) and adds its parameters'
gradients, in float32, to what it has. After the last tick the gradients are summed over the data
replicas, once.

Letters: K stages, M micro-batches, B examples of a micro-batch on one replica, t tick, k stage.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpipe_jax.layers.shapes import differentiable
from gpipe_jax.losses import weighted_sums
from gpipe_jax.mesh import DATA, STAGE
from gpipe_jax.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.slots import Rows, lower
from gpipe_jax.stages import Stages

PyTree = Any


class Entry(NamedTuple):
    """The micro-batch of one entry of the table, and where its input and its gradient are kept."""

    micro_batch: jax.Array
    x: jax.Array
    g: jax.Array


class Carry(NamedTuple):
    """What a device keeps from one tick to the next."""

    arrived_x: list  # wire arrays from the previous stage's last tick
    arrived_g: list  # wire arrays (gradients) from the next stage's last tick
    stash: list  # [slots, *wire]: boundary inputs until their last use
    gradients: list  # [slots, *wire]: boundary gradients until they are used
    grads: PyTree  # parameters' gradients so far, or None
    result: PyTree  # loss and metrics so far, or the outputs [M, B, ...]


class Work(NamedTuple):
    """What a device makes of one tick."""

    send_x: list
    send_g: list
    grads: PyTree
    result: PyTree


def build(
    stages: Stages, schedule: Schedule, mesh: Mesh, loss: Callable | None, *, idle_fill: float = 0.0
) -> Callable:
    """The traced function (params, batch, key) that runs `schedule`.

    `params` is the rectangular form (axis 0 is the stage), `batch` has leaves [M, D*B, ...] with
    weights that sum to one, `key` is the step's. Returns, for a schedule with backwards, ((loss,
    metrics), grads); for a forward-only one (loss, metrics), or without `loss` the outputs.
    `idle_fill` is what buffers hold before anything arrives and what idle devices send: a test sets
    it to NaN to show that none of it is ever used.
    """
    rows = lower(schedule)
    trains = bool((schedule.table[..., 0] == BACKWARD).any())

    def body(params: PyTree, ids: jax.Array, batch: dict, key: jax.Array) -> PyTree:
        params, ids = jax.tree.map(lambda a: a[0], (params, ids))
        device = _Device(
            stages=stages,
            schedule=schedule,
            rows=rows,
            trains=trains,
            loss=loss,
            fill=idle_fill,
            replicas=mesh.shape[DATA],
            params=params,
            ids=ids,
            batch=batch,
            key=key,
        )
        return device.run()

    in_specs = (P(STAGE), P(STAGE), P(None, DATA), P())
    result_spec = P(None, DATA) if loss is None else P()
    out_specs = (result_spec, P(STAGE)) if trains else result_spec
    mapped = _on_every_device(body, mesh, in_specs, out_specs)
    ids: Any = stages.layer_ids()
    return lambda params, batch, key: mapped(params, ids, batch, key)


def _on_every_device(body: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over all axes, without its check of which values differ between devices.

    The check would refuse any layer with a loop that starts from a constant (`nnx.RNN`), because
    the constant does not differ and the loop's result does. Nothing here relies on it: gradients
    are taken within a device, and the three sums over devices are written out in `_finish`.
    """
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def build_parameters(stages: Stages, mesh: Mesh, make: Callable) -> PyTree:
    """Traced: the rectangular form of what `make(shape, layer id)` returns for each layer.

    Every device makes its own stage's layers and no others; see `Stages.build`.
    """
    kinds = sorted(set(stages.kind))
    branch = jnp.searchsorted(jnp.asarray(kinds), jnp.asarray(stages.kind))

    def body(branch: jax.Array, ids: jax.Array) -> PyTree:
        branches = [functools.partial(stages.build, k, make=make) for k in kinds]
        return jax.tree.map(lambda a: a[None], lax.switch(branch[0], branches, ids[0]))

    specs = (P(STAGE), P(STAGE))
    mapped = _on_every_device(body, mesh, specs, P(STAGE))
    return mapped(branch, jnp.asarray(stages.layer_ids()))


@dataclass(frozen=True)
class _Device:
    """The program of one device, for all of them; arrays are the device's own."""

    stages: Stages
    schedule: Schedule
    rows: Rows
    trains: bool
    loss: Callable | None
    fill: float
    replicas: int
    params: PyTree
    ids: jax.Array  # global ids of this stage's layers
    batch: dict  # leaves [M, B, ...]
    key: jax.Array

    def run(self) -> PyTree:
        """All ticks, segment by segment, and the sums over devices after them."""
        carry = self._start()
        columns = self.rows[1:6]
        for begin, end in self._segments():
            names = self._names()[begin:end]
            known = sorted(set(names.ravel().tolist()))
            branch = np.searchsorted(known, names)
            table = np.stack([*(column[begin:end] for column in columns), branch], axis=-1)
            tick = functools.partial(self._tick, known)
            carry, _ = lax.scan(tick, carry, jnp.asarray(table, jnp.int32))
        return self._finish(carry)

    # --- buffers ---------------------------------------------------------------------------------

    def _start(self) -> Carry:
        wire, back = self.stages.wire.shapes, self._gradient_shapes()
        return Carry(
            arrived_x=[self._filled(s) for s in wire],
            arrived_g=[self._filled(s) for s in back],
            stash=[self._filled(s, self.rows.x_slots) for s in wire],
            gradients=[self._filled(s, self.rows.g_slots) for s in back],
            grads=self._zero_grads() if self.trains else None,
            result=self._zero_result(),
        )

    def _gradient_shapes(self) -> list:
        return self.stages.wire.gradient_shapes if self.trains else []

    def _filled(self, spec: jax.ShapeDtypeStruct, *lead: int) -> jax.Array:
        fill = self.fill if differentiable(spec) else 0
        return jnp.full((*lead, *spec.shape), fill, spec.dtype)

    def _zero_grads(self) -> PyTree:
        return jax.tree.map(
            lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)),
            self.stages.local_shapes(),
        )

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

    def _finish(self, carry: Carry) -> PyTree:
        if self.loss is None:
            return lax.psum(carry.result, STAGE)
        result = lax.psum(carry.result, (STAGE, DATA))
        if not self.trains:
            return result
        return result, jax.tree.map(lambda a: a[None], lax.psum(carry.grads, DATA))

    # --- the table -------------------------------------------------------------------------------

    def _segments(self) -> list[tuple[int, int]]:
        """Ticks [begin, end): before the first backward, after the last forward, and between.

        So a stretch of forwards carries no backward code and no gradient traffic.
        """
        operation = self.schedule.table[..., 0]
        forward = np.nonzero((operation == FORWARD).any(axis=1))[0]
        backward = np.nonzero((operation == BACKWARD).any(axis=1))[0]
        first_b = int(backward[0]) if len(backward) else len(operation)
        last_f = max(int(forward[-1]) + 1, first_b)
        cuts = [0, first_b, last_f, len(operation)]
        return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def _names(self) -> np.ndarray:
        """[T, K]: the branch that does each slot of the table, as "operation stage"."""
        operation = self.schedule.table[..., 0]
        names = np.full(operation.shape, "idle", dtype="U32")
        for k, kind in enumerate(self.stages.kind):
            forward = f"forward {kind}"
            if k == self.stages.last:
                # In training the last stage's backward computes its forward, loss and gradient.
                forward = "idle" if self.trains else f"evaluate {kind}"
            names[operation[:, k] == FORWARD, k] = forward
            names[operation[:, k] == BACKWARD, k] = f"backward {kind}"
        return names

    def _tick(self, known: list[str], carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        m, receive_x, receive_g, x_slot, g_slot, branch = rows[lax.axis_index(STAGE)]
        carry = carry._replace(
            stash=_store(carry.stash, carry.arrived_x, receive_x),
            gradients=_store(carry.gradients, carry.arrived_g, receive_g),
        )
        branches = [functools.partial(self._work, name) for name in known]
        work = lax.switch(branch, branches, carry, Entry(m, x_slot, g_slot))
        carry = carry._replace(grads=work.grads, result=work.result)
        # Acyclic permutes: nothing needs the wrap-around, which XLA has mis-compiled (issue 45222).
        if any(name.startswith("forward") for name in known):
            down = [(k, k + 1) for k in range(self.stages.last)]
            carry = carry._replace(arrived_x=_permute(work.send_x, down))
        if any(name.startswith("backward") for name in known):
            up = [(k + 1, k) for k in range(self.stages.last)]
            carry = carry._replace(arrived_g=_permute(work.send_g, up))
        return carry, None

    # --- one operation on one micro-batch --------------------------------------------------------

    def _work(self, name: str, carry: Carry, entry: Entry) -> Work:
        """The branch `name`, on the buffers of `carry`."""
        operation, _, kind = name.partition(" ")
        nothing = Work(
            send_x=[self._filled(s) for s in self.stages.wire.shapes],
            send_g=[self._filled(s) for s in self._gradient_shapes()],
            grads=carry.grads,
            result=carry.result,
        )
        if operation == "idle":
            return nothing
        method = {"forward": self._forward, "backward": self._backward, "evaluate": self._evaluate}
        return method[operation](int(kind), carry, entry, nothing)

    def _forward(self, k: int, carry: Carry, entry: Entry, nothing: Work) -> Work:
        y = self._apply(k, self.params, self._input(k, carry, entry), entry)
        wire = self.stages.wire
        return nothing._replace(send_x=wire.encode(jax.tree.leaves(y), wire.shapes))

    def _evaluate(self, k: int, carry: Carry, entry: Entry, nothing: Work) -> Work:
        y = self._apply(k, self.params, self._input(k, carry, entry), entry)
        if self.loss is None:
            result = jax.tree.map(lambda a, b: _put(a, b, entry.micro_batch), carry.result, y)
        else:
            result = jax.tree.map(jnp.add, carry.result, self._loss(y, entry))
        return nothing._replace(result=result)

    def _backward(self, k: int, carry: Carry, entry: Entry, nothing: Work) -> Work:
        """Recompute the stage from its input, then its gradients; the last one starts at the loss.

        Only what the stage reads is differentiated: of the parameters, what it uses; of the input,
        the floating-point leaves of a boundary.
        """
        leaves, structure = jax.tree.flatten(self._input(k, carry, entry))
        moving = [i for i, a in enumerate(leaves) if k > 0 and differentiable(a)]
        used = self.stages.used(k)

        def run(chosen: dict, floats: list) -> tuple[Any, Any]:
            params = {
                name: _replace_at(self.params[name], used[name], chosen[name]) for name in used
            }
            x = jax.tree.unflatten(structure, _replace_at(leaves, moving, floats))
            y = self._apply(k, params, x, entry)
            if k == self.stages.last:
                loss, metrics = self._loss(y, entry)
                return loss, (loss, metrics)
            return [a for a in jax.tree.leaves(y) if differentiable(a)], None

        chosen = {name: [self.params[name][i] for i in used[name]] for name in used}
        y, pull, result = jax.vjp(run, chosen, [leaves[i] for i in moving], has_aux=True)
        d_params, d_x = pull(jnp.ones_like(y) if result else self._gradient(k, carry, entry))
        send_g = nothing.send_g
        if k > 0:
            send_g = self.stages.wire.encode(d_x, self._gradient_shapes())
        grads = {n: _add_at(carry.grads[n], used[n], d_params[n]) for n in used}
        if result:
            result = jax.tree.map(jnp.add, carry.result, result)
        return Work(nothing.send_x, send_g, grads, result or carry.result)

    def _input(self, k: int, carry: Carry, entry: Entry) -> PyTree:
        if k == 0:
            return jax.tree.map(lambda a: _get(a, entry.micro_batch), self.batch["inputs"])
        leaves, structure = jax.tree.flatten(self.stages.input(k))
        arrays = [_get(a, entry.x) for a in carry.stash]
        return jax.tree.unflatten(structure, self.stages.wire.decode(arrays, leaves))

    def _gradient(self, k: int, carry: Carry, entry: Entry) -> list[jax.Array]:
        leaves = [a for a in jax.tree.leaves(self.stages.input(k + 1)) if differentiable(a)]
        return self.stages.wire.decode([_get(a, entry.g) for a in carry.gradients], leaves)

    def _apply(self, k: int, params: PyTree, x: PyTree, entry: Entry) -> PyTree:
        micro_batch = entry.micro_batch * self.replicas + lax.axis_index(DATA)
        return self.stages.forward(k, params, x, self.ids, self.key, micro_batch, train=self.trains)

    def _loss(self, outputs: PyTree, entry: Entry) -> tuple:
        targets = (self.batch["labels"], self.batch["weights"])
        labels, weights = jax.tree.map(lambda a: _get(a, entry.micro_batch), targets)
        assert self.loss is not None  # nothing asks for a loss in a program of outputs
        return weighted_sums(self.loss, outputs, labels, weights)


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


def _replace_at(items: list, indices: list[int], values: list) -> list:
    new = dict(zip(indices, values, strict=True))
    return [new.get(i, item) for i, item in enumerate(items)]


def _add_at(items: list, indices: list[int], values: list) -> list:
    new = dict(zip(indices, values, strict=True))
    return [a + new[i].astype(a.dtype) if i in new else a for i, a in enumerate(items)]
