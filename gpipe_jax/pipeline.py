"""`Pipeline`: a sequence of layers on a mesh, and one exact training step of it.

`Pipeline.value_and_grad` is equal to `sequential.value_and_grad` of the same layers, whatever the
number of stages, replicas and micro-batches, and whatever the schedule.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax import batch as batches
from gpipe_jax import cost as costs
from gpipe_jax import executor, partition, report
from gpipe_jax.keys import layer_key, step_key
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shapes import describe, infer_shapes
from gpipe_jax.losses import weighted_sums
from gpipe_jax.mesh import DATA, STAGE
from gpipe_jax.schedule import Schedule, forward_only, training_schedule
from gpipe_jax.slots import lower
from gpipe_jax.stages import Stages

PyTree = Any


class State(NamedTuple):
    """What a pipeline carries from step to step."""

    params: PyTree  # rectangular: axis 0 of every array is the stage; see `Pipeline.to_layers`
    seed: jax.Array  # of all randomness in training; uint32 []


class Pipeline:
    """A network cut into K composite layers, one for each position along the mesh's stage axis.

    `layers` is a sequence of `gpipe_jax.layer(...)`; each takes one pytree and returns one.
    `loss(outputs, labels)` returns the losses of the examples (see `losses`). `example` is a batch,
    or its shapes: {"inputs": ..., "labels": ..., "weights": [N] optional}; its N examples are split
    into `micro_batches` x D equal parts. Later batches may be shorter: they are padded with
    examples of weight zero. `schedule` is "gpipe", "1f1b", "eager_1f1b" or a table of one's own
    (see `schedule`).

    `partition` is "auto", which minimises the slowest stage by the layers' `cost` ("flops", "time",
    or one number a layer; see `cost`), or the index of the first layer of stages 1 to K-1.
    `memory_limit` bounds, in bytes, what a device holds: parameters, gradients and two optimizer
    slots (padding included), stashed inputs, and a stage's working set. The backward pass
    recomputes each stage from its input; `remat="layer"` also recomputes within it layer by layer,
    for less memory and about a third more time.

    Building a pipeline allocates nothing on any device, so the mesh may be a compile-only one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        loss: Callable,
        mesh: Mesh,
        example: dict,
        micro_batches: int = 1,
        schedule: str | Schedule = "1f1b",
        partition: str | Sequence[int] = "auto",
        cost: str | Sequence[float] = "flops",
        memory_limit: float | None = None,
        remat: str = "stage",
    ) -> None:
        if remat not in ("stage", "layer"):
            raise ValueError(f"`remat` must be 'stage' or 'layer', got {remat!r}")
        self.layers, self.loss, self.mesh = tuple(layers), loss, mesh
        self.micro_batches = micro_batches
        if not self.layers:
            raise ValueError("`layers` is empty; give at least one layer for each stage")
        if set(mesh.axis_names) != {STAGE, DATA}:
            raise ValueError(
                f"`mesh` has the axes {mesh.axis_names}; it needs {STAGE!r} and {DATA!r}, as "
                f"gpipe_jax.make_mesh(stages=..., data=...) makes them"
            )
        self.schedule = training_schedule(schedule, mesh.shape[STAGE], micro_batches)
        self.example = batches.shapes_of(example, mesh.shape[DATA], micro_batches)
        self._one = jax.tree.map(self._micro_batch_shape, self.example)
        self.shapes = infer_shapes(self.layers, self._one["inputs"])
        self._check_loss()
        platform = mesh.devices.flat[0].platform
        self.costs = costs.measure(self.shapes, cost, platform)
        self.partition = self._cut(partition, cost, platform, memory_limit)
        self.stages = Stages(self.shapes, self.partition.stages, remat_layers=remat == "layer")

    # --- cutting ---------------------------------------------------------------------------------

    def _micro_batch_shape(self, a: Any) -> jax.ShapeDtypeStruct:
        size = a.shape[0] // (self.replicas * self.micro_batches)
        return jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype)

    def _check_loss(self) -> None:
        """Evaluate the loss abstractly, so that a mismatch is found before anything compiles."""
        one, outputs = self._one, self.shapes[-1].output
        try:
            jax.eval_shape(
                lambda *a: weighted_sums(self.loss, *a), outputs, one["labels"], one["weights"]
            )
        except Exception as error:
            raise ValueError(
                f"`loss` does not take the outputs of layer {len(self.layers) - 1}, "
                f"{self.layers[-1]}: {describe(outputs)}, with labels {describe(one['labels'])}: "
                f"{error}"
            ) from error

    def _cut(
        self, wanted: Any, cost: Any, platform: str, memory_limit: float | None
    ) -> partition.Partition:
        times = [c.compute_s for c in self.costs]
        options: dict = dict(
            # Costs that the caller gave are in a unit of their own: nothing to add to them.
            transfer=costs.transfer_s(self.costs, platform) if isinstance(cost, str) else None,
            # Value, gradient and two optimizer slots for each parameter.
            memory=[4 * c.parameter_bytes + c.working_bytes for c in self.costs],
            memory_limit=memory_limit,
            names=[str(layer) for layer in self.layers],
        )
        count = self.mesh.shape[STAGE]
        if isinstance(wanted, str) and wanted != "auto":
            raise ValueError(
                f"`partition` must be 'auto' or the first layer of stages 1 to {count - 1}, "
                f"got {wanted!r}"
            )
        if wanted != "auto":
            return partition.explicit(wanted, times, stages=count, **options)
        padding = [c.parameter_bytes for c in self.costs]
        return partition.partition(times, count, padding=padding, **options)

    @property
    def device_bytes(self) -> dict[str, int]:
        """What every device holds, by part, estimated from shapes: bytes."""
        wire = sum(a.size * a.dtype.itemsize for a in self.stages.wire.shapes)
        rows = lower(self.schedule)
        working = [sum(self.costs[i].working_bytes for i in cut) for cut in self.stages.cuts]
        return {
            "parameters, gradients, optimizer": 4 * self.stages.device_bytes(),
            # Arrived and sent arrays are held beside the slots.
            "boundaries": (rows.x_slots + rows.g_slots + 4) * wire,
            "working set": max(working),
        }

    def _check_memory(self, limit: float | None) -> None:
        need = sum(self.device_bytes.values())
        if limit is not None and need > limit:
            parts = ", ".join(f"{name} {n / 2**30:.3g}" for name, n in self.device_bytes.items())
            raise ValueError(
                f"a device needs {need / 2**30:.3g} GiB ({parts}), but `memory_limit` is "
                f"{limit / 2**30:.3g} GiB; use more stages or micro-batches, or raise it"
            )

    @property
    def replicas(self) -> int:
        """D, the number of data-parallel replicas."""
        return self.mesh.shape[DATA]

    @property
    def batch_size(self) -> int:
        """N, the examples of a full batch."""
        return self.example["weights"].shape[0]

    # --- parameters ------------------------------------------------------------------------------

    def init(self, seed: int = 0) -> State:
        """Fresh parameters, each made on its own device; the same for every K, D and schedule."""
        return jax.jit(self._init, out_shardings=self._state_shardings())(jnp.uint32(seed))

    def _init(self, seed: jax.Array) -> State:
        def make(shape: Any, i: jax.Array) -> PyTree:
            x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape.input)
            return shape.layer.init(layer_key(seed, i), x)

        return State(executor.build_parameters(self.stages, self.mesh, make), seed)

    def _state_shardings(self) -> State:
        stage: Any = NamedSharding(self.mesh, P(STAGE))
        shape = jax.tree.map(lambda _: stage, self.stages.local_shapes())
        everywhere: Any = NamedSharding(self.mesh, P())
        return State(shape, everywhere)

    def to_layers(self, tree: PyTree) -> list[PyTree]:
        """Parameters or gradients as L trees of numpy arrays in layer order, for any K the same.

        `tree` is a `State`, or anything in the form of its `params`.
        """
        params = tree.params if isinstance(tree, State) else tree
        whole = jax.tree.map(np.asarray, params)
        layers = []
        for k in range(self.stages.count):
            local = jax.tree.map(lambda a, k=k: a[k], whole)
            layers += self.stages.split_layers(k, local)
        return layers

    def from_layers(self, trees: Sequence[PyTree], seed: int = 0) -> State:
        """A state with these parameters: the inverse of `to_layers`."""
        self._check_layers(trees)
        cuts = self.stages.cuts
        local = [self.stages.join_layers(k, [trees[i] for i in cut]) for k, cut in enumerate(cuts)]
        sharding = NamedSharding(self.mesh, P(STAGE))

        def place(*parts: np.ndarray) -> jax.Array:
            shape = (len(parts), *parts[0].shape)
            rows = lambda index: np.stack(parts[index[0]])  # noqa: E731
            return jax.make_array_from_callback(shape, sharding, rows)  # type: ignore[arg-type]

        params = jax.tree.map(place, *local)
        return State(params, jax.device_put(np.uint32(seed), NamedSharding(self.mesh, P())))

    def _check_layers(self, trees: Sequence[PyTree]) -> None:
        if len(trees) != len(self.layers):
            raise ValueError(f"{len(trees)} parameter trees for {len(self.layers)} layers")
        for i, (tree, shape) in enumerate(zip(trees, self.shapes, strict=True)):
            have, want = jax.tree.map(np.shape, (tree, shape.params))
            if have != want:
                have = describe(jax.tree.map(np.asarray, tree))
                raise ValueError(
                    f"layer {i}, {shape.layer}, has parameters {describe(shape.params)}, got {have}"
                )

    def spread(self, trees: Sequence[PyTree]) -> PyTree:
        """Traced: one number for each parameter, spread over the rectangular form.

        `trees` holds L trees of numbers in layer order; equal layers must have equal numbers.
        """
        by_layer = {id(s): tree for s, tree in zip(self.shapes, trees, strict=True)}

        def make(shape: Any, i: jax.Array) -> PyTree:
            return jax.tree.map(
                lambda a, v: jnp.full(a.shape, v, a.dtype), shape.params, by_layer[id(shape)]
            )

        return executor.build_parameters(self.stages, self.mesh, make)

    # --- one step --------------------------------------------------------------------------------

    def split(self, batch: dict) -> dict:
        """A batch as micro-batches on the devices: arrays [M, D*B, ...], weights summing to one.

        A batch of fewer than N examples is padded with copies of its first one, of weight zero.
        """
        return self._place(batches.split(batch, self.example, self.micro_batches))

    def _place(self, parts: PyTree) -> PyTree:
        return jax.device_put(parts, NamedSharding(self.mesh, P(None, DATA)))

    def gradients(self, state: State, parts: dict, step: Any, *, idle_fill: float = 0.0) -> tuple:
        """Traced: ((loss, metrics), gradients) of the micro-batches that `split` made."""
        run = executor.build(self.stages, self.schedule, self.mesh, self.loss, idle_fill=idle_fill)
        return run(state.params, parts, step_key(state.seed, step))

    def losses(self, state: State, parts: dict) -> tuple:
        """Traced: (loss, metrics) through the forward-only schedule, in evaluation mode."""
        run = executor.build(self.stages, self._forward_schedule, self.mesh, self.loss)
        return run(state.params, parts, step_key(state.seed, 0))

    def outputs(self, state: State, inputs: PyTree) -> PyTree:
        """Traced: the network's outputs [M, D*B, ...] for inputs [M, D*B, ...]."""
        run = executor.build(self.stages, self._forward_schedule, self.mesh, None)
        return run(state.params, {"inputs": inputs}, step_key(state.seed, 0))

    @functools.cached_property
    def _forward_schedule(self) -> Schedule:
        return forward_only(self.mesh.shape[STAGE], self.micro_batches)

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable]:
        names = ("gradients", "losses", "outputs")
        return {name: jax.jit(getattr(self, name)) for name in names}

    def value_and_grad(self, state: State, batch: dict, step: int = 0) -> tuple:
        """((loss, metrics), gradients, state) of a batch.

        The loss and the metrics are weighted means over the batch, seen by every host. Gradients
        have the form of `state.params`, in float32; `to_layers` gives them layer by layer. `step`
        seeds dropout.
        """
        result, grads = self._jitted["gradients"](state, self.split(batch), jnp.uint32(step))
        return result, grads, state

    def evaluate(self, state: State, batch: dict) -> tuple[jax.Array, dict]:
        """(loss, metrics) of a batch in evaluation mode: weighted means over its examples."""
        return self._jitted["losses"](state, self.split(batch))

    def apply(self, state: State, inputs: PyTree) -> PyTree:
        """The network's outputs in evaluation mode, for any number of examples."""
        count = batches.count_examples(inputs)
        chunks = []
        for start in range(0, count, self.batch_size):
            chunk = jax.tree.map(lambda a, s=start: np.asarray(a)[s : s + self.batch_size], inputs)
            parts = batches.split_inputs(chunk, self.example, self.micro_batches)
            out = self._jitted["outputs"](state, self._place(parts))
            size = min(self.batch_size, count - start)
            chunks.append(jax.tree.map(lambda a, n=size: a.reshape(-1, *a.shape[2:])[:n], out))
        return jax.tree.map(lambda *a: jnp.concatenate(a), *chunks)

    def abstract_arguments(self) -> tuple:
        """The shapes and places of `gradients`' arguments: state, micro-batches and step."""
        shape = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        state = jax.eval_shape(self._init, jnp.uint32(0))
        state = jax.tree.map(shape, state, self._state_shardings())
        split = NamedSharding(self.mesh, P(None, DATA))
        M = self.micro_batches
        parts = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((M, a.shape[0] // M, *a.shape[1:]), a.dtype),
            self.example,
        )
        parts = jax.tree.map(lambda a: shape(a, split), parts)
        step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=NamedSharding(self.mesh, P()))
        return state, parts, step

    def lower(self) -> jax.stages.Lowered:
        """`gradients` lowered for the mesh's devices, from shapes, to compile and to measure."""
        return self._jitted["gradients"].lower(*self.abstract_arguments())

    # --- report ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return report.as_text(self)

    def _repr_html_(self) -> str:
        return report.as_html(self)
