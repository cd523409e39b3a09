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
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax import batch as batches
from gpipe_jax import blocks, executor, keys, memory, partition, report
from gpipe_jax import cost as costs
from gpipe_jax.executor import Variables
from gpipe_jax.keys import layer_key, step_key
from gpipe_jax.layers import links
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shapes import LayerShape, describe, infer_shapes
from gpipe_jax.losses import weighted_sums
from gpipe_jax.mesh import DATA, STAGE, is_shared, platform_of
from gpipe_jax.schedule import Schedule, forward_only, training_schedule
from gpipe_jax.stages import Stages
from gpipe_jax.storage import Storage, of_all_devices
from gpipe_jax.stream import DataError

PyTree = Any
REMAT = ("stage", "layer")


class State(NamedTuple):
    """What a pipeline carries from step to step."""

    params: PyTree  # rectangular, axis 0 is cut over the devices; see `Pipeline.to_layers`
    stats: PyTree  # running statistics of batch norms, likewise; see `Pipeline.statistics`
    seed: jax.Array  # of all randomness in training; uint32 []


class Pipeline:
    """A network cut into composite layers, one for each position along the mesh's stage axis.

    `layers` is a sequence of `gpipe_jax.layer(...)`; each takes one pytree and returns one.
    `loss(outputs, labels)` returns the losses of the examples (see `losses`). `example` is a batch,
    or its shapes: {"inputs": ..., "labels": ..., "weights": [N] optional}; its N examples are split
    into `micro_batches` x D equal parts. Later batches may be shorter: they are padded with
    examples of weight zero. `schedule` is "gpipe", "1f1b", "eager_1f1b", "interleaved" or a table
    of one's own (see `schedule`). With "interleaved" each device holds `chunks` composite layers,
    so the network is cut into V times as many stages as there are devices.

    `partition` is "auto", which minimises the slowest stage by the layers' `cost` ("flops", "time",
    or one number a layer; see `cost`), or the index of the first layer of every stage but the
    first.
    `memory_limit` bounds, in bytes, what a device holds: parameters, gradients and two optimizer
    slots (padding included), stashed inputs, and a stage's working set. The backward pass
    recomputes each stage from its input; `remat="layer"` also recomputes within it layer by layer,
    for less memory and about a third more time.

    `keys_per` says whose randomness it is (dropout): that of a "micro_batch", or of an "example",
    which makes it independent of the number of micro-batches and replicas too. `steps` is the
    length of the training run, for what changes on the way (drop-path); None is its end.

    Building a pipeline allocates nothing on any device, so the mesh may be a compile-only or an
    abstract one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        loss: Callable,
        mesh: Mesh | AbstractMesh,
        example: dict,
        micro_batches: int = 1,
        schedule: str | Schedule = "1f1b",
        partition: str | Sequence[int] = "auto",
        cost: str | Sequence[float] = "flops",
        memory_limit: float | None = None,
        remat: str = "stage",
        chunks: int = 1,
        keys_per: str = "micro_batch",
        steps: int | None = None,
    ) -> None:
        for name, value, known in (("remat", remat, REMAT), ("keys_per", keys_per, keys.PER)):
            if value not in known:
                raise ValueError(f"`{name}` must be {known[0]!r} or {known[1]!r}, got {value!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"`steps` of the training run must be at least 1, got {steps}")
        self.layers, self.loss, self.mesh = tuple(layers), loss, mesh
        self.micro_batches = micro_batches
        if not self.layers:
            raise ValueError("`layers` is empty; give at least one layer for each stage")
        if set(mesh.axis_names) != {STAGE, DATA}:
            raise ValueError(
                f"`mesh` has the axes {mesh.axis_names}; it needs {STAGE!r} and {DATA!r}, as "
                f"gpipe_jax.make_mesh(stages=..., data=...) makes them"
            )
        self.keys_per, self.steps = keys_per, steps
        self.schedule = training_schedule(schedule, mesh.shape[STAGE], micro_batches, chunks)
        self.example = batches.shapes_of(example, mesh.shape[DATA], micro_batches)
        self.one_micro_batch = jax.tree.map(self._micro_batch_shape, self.example)
        self.shapes = infer_shapes(self.layers, self.one_micro_batch["inputs"])
        self._check_loss()
        platform = platform_of(mesh)
        self.costs = costs.measure(self.shapes, cost, platform, shared=is_shared(mesh))
        self.remat = remat
        self.partition = self._cut(partition, cost, platform, memory_limit)
        self.stages = Stages(
            self.shapes,
            self.partition.stages,
            chunks=self.schedule.chunks,
            remat_layers=remat == "layer",
        )
        self._check_memory(memory_limit)

    # --- cutting ---------------------------------------------------------------------------------

    def _micro_batch_shape(self, a: Any) -> jax.ShapeDtypeStruct:
        size = a.shape[0] // (self.replicas * self.micro_batches)
        return jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype)

    def _check_loss(self) -> None:
        """Evaluate the loss abstractly, so that a mismatch is found before anything compiles."""
        one, outputs = self.one_micro_batch, self.shapes[-1].output
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
            memory=self._layer_bytes(),
            memory_limit=memory_limit,
            names=[str(layer) for layer in self.layers],
        )
        count = self.mesh.shape[STAGE] * self.schedule.chunks
        if isinstance(wanted, str) and wanted != "auto":
            raise ValueError(
                f"`partition` must be 'auto' or the first layer of stages 1 to {count - 1}, "
                f"got {wanted!r}"
            )
        if wanted != "auto":
            return partition.explicit(wanted, times, stages=count, **options)
        padding = [c.parameter_bytes for c in self.costs]
        return partition.partition(times, count, padding=padding, **options)

    def _layer_bytes(self) -> list[int]:
        """What each layer adds to what its device holds."""
        # With its own recomputation a layer's input is all that is kept of it.
        kept = [
            costs.tree_bytes(shape.boundary) if self.remat == "layer" else c.working_bytes
            for c, shape in zip(self.costs, self.shapes, strict=True)
        ]
        # Value, gradient and two optimizer slots for each parameter.
        return [4 * c.parameter_bytes + k for c, k in zip(self.costs, kept, strict=True)]

    def device_bytes(self, optimizer_bytes: int | None = None) -> dict[str, int]:
        """What every device holds, by part, estimated from shapes: bytes. See `memory`.

        The optimizer is taken for one with two slots for each parameter, if nothing is said.
        """
        parameters = self.stages.device_bytes()
        return memory.of_device(
            self.stages,
            self.costs,
            self.schedule,
            optimizer_bytes=2 * parameters if optimizer_bytes is None else optimizer_bytes,
            loss_bytes=self.loss_bytes(),
            batch_bytes=self.micro_batches * costs.tree_bytes(self.one_micro_batch),
        )

    def loss_bytes(self) -> int:
        """Bytes that the loss of a micro-batch works with, on one replica."""
        one, outputs = self.one_micro_batch, self.shapes[-1].output
        return costs.loss_bytes(self.loss, outputs, one["labels"], one["weights"])

    def _check_memory(self, limit: float | None) -> None:
        if limit is None:
            return
        parts = self.device_bytes()
        need = sum(parts.values())
        if need > limit:
            raise ValueError(
                f"a device needs {need / 2**30:.3g} GiB ({memory.describe(parts)}), but "
                f"`memory_limit` is {limit / 2**30:.3g} GiB; use more stages or micro-batches, "
                f"or raise it"
            )

    @property
    def replicas(self) -> int:
        """D, the number of data-parallel replicas."""
        return self.mesh.shape[DATA]

    @property
    def micro_batch_size(self) -> int:
        """B, the examples of a micro-batch on one replica."""
        return self.one_micro_batch["weights"].shape[0]

    @property
    def batch_size(self) -> int:
        """N, the examples of a full batch."""
        return self.example["weights"].shape[0]

    # --- parameters ------------------------------------------------------------------------------

    def init(self, seed: int = 0) -> State:
        """Fresh parameters, each made on its own device; the same for every K, D and schedule."""
        # It runs once, and on CPU its code takes six times as long to optimize as to compile.
        on_cpu = platform_of(self.mesh) == "cpu"
        options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
        places = self.state_shardings()
        init = jax.jit(self._init, out_shardings=places, compiler_options=options)
        return init(np.uint32(seed))

    def _init(self, seed: jax.Array) -> State:
        def params(shape: LayerShape, i: jax.Array) -> PyTree:
            x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape.input)
            fresh = shape.layer.init(layer_key(seed, i), x)
            return links.borrow(shape.layer, fresh, shape.borrowed)[0]

        def stats(shape: LayerShape, i: jax.Array) -> PyTree:
            return shape.layer.init_statistics()

        stages = self.stages
        return State(
            executor.build_arrays(stages, stages.params, self.mesh, params),
            executor.build_arrays(stages, stages.stats, self.mesh, stats),
            seed,
        )

    def state_shardings(self) -> State:
        """Where the parts of a state lie."""
        stage: Any = NamedSharding(self.mesh, P(STAGE))
        everywhere: Any = NamedSharding(self.mesh, P())
        params, stats = (
            [jax.tree.map(lambda _: stage, storage.local_shapes()) for storage in storages]
            for storages in (self.stages.params, self.stages.stats)
        )
        return State(params, stats, everywhere)

    def to_layers(self, tree: PyTree) -> list[PyTree]:
        """Parameters or gradients as L trees of numpy arrays in layer order, for any K the same.

        `tree` is a `State`, or anything in the form of its `params`. A tied parameter is in its
        first layer, and None in the others. Every stage must be on a device of this process.
        """
        params = tree.params if isinstance(tree, State) else tree
        return self._split(self.stages.params, params)

    def statistics(self, state: State) -> list[PyTree]:
        """Running statistics as L trees of numpy arrays in layer order, for any K the same."""
        return self._split(self.stages.stats, state.stats)

    def _split(self, storages: Sequence[Storage], tree: PyTree) -> list[PyTree]:
        layers: dict[int, PyTree] = {}
        for k in blocks.held(self.mesh):
            layers |= self.stages.split_block(storages, k, blocks.take(self.mesh, tree, k))
        if len(layers) < len(self.layers):
            raise ValueError(
                f"this process's devices hold {len(layers)} of {len(self.layers)} layers; save a "
                f"checkpoint, which every process writes a part of"
            )
        return [layers[i] for i in range(len(self.layers))]

    def from_layers(
        self,
        params: Sequence[PyTree],
        seed: int = 0,
        *,
        statistics: Sequence[PyTree] | None = None,
    ) -> State:
        """A state with these parameters: the inverse of `to_layers` and `statistics`.

        Without `statistics`, fresh ones.
        """
        if statistics is None:
            statistics = [shape.layer.init_statistics() for shape in self.shapes]
        self._check_layers("parameters", params, [shape.params for shape in self.shapes])
        self._check_layers("statistics", statistics, [shape.stats for shape in self.shapes])
        stages, whole = self.stages, blocks.replicate(self.mesh, np.uint32(seed))
        return State(self._join(stages.params, params), self._join(stages.stats, statistics), whole)

    def _join(self, storages: Sequence[Storage], layers: Sequence[PyTree]) -> list[PyTree]:
        make = lambda k: self.stages.join_block(storages, k, layers.__getitem__)  # noqa: E731
        return blocks.place(self.mesh, make)

    def _check_layers(self, what: str, trees: Sequence[PyTree], wanted: Sequence[PyTree]) -> None:
        if len(trees) != len(self.layers):
            raise ValueError(f"{len(trees)} trees of {what} for {len(self.layers)} layers")
        for i, (tree, like) in enumerate(zip(trees, wanted, strict=True)):
            have, want = jax.tree.map(np.shape, (tree, like))
            if have != want:
                have = describe(jax.tree.map(np.asarray, tree))
                raise ValueError(
                    f"layer {i}, {self.layers[i]}, has {what} {describe(like)}, got {have}"
                )

    def mask_parameters(self, chosen: Callable[[tuple[int, ...]], bool]) -> PyTree:
        """Traced: which parameters are `chosen` by their shapes, in the rectangular form."""
        return executor.mask_parameters(self.stages, self.mesh, chosen)

    # --- one step --------------------------------------------------------------------------------

    def split(self, batch: dict) -> dict:
        """A batch as micro-batches on the devices: arrays [M, D*B, ...], weights summing to one.

        A batch of fewer than N examples is padded with copies of its first one, of weight zero.
        """
        return self._place(batches.split(batch, self.example, self.micro_batches))

    def training_split(self, batch: dict) -> dict:
        """`split`, for training: refuses padding where batch norm would count it.

        If this process has devices of some replicas only, `batch` holds their examples, `rows`.
        """
        count = batches.count_examples(batch["inputs"])
        if len(self.rows) < self.batch_size:
            return self._split_rows(batch, count)
        if count < self.batch_size and any(jax.tree.leaves(s.stats) for s in self.shapes):
            raise DataError(
                f"a batch of {count} examples cannot be padded to {self.batch_size} in training: "
                f"batch norm would count the padding; give full batches"
            )
        return self.split(batch)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Positions in a batch of the examples that this process's devices work on."""
        N, M, D = self.batch_size, self.micro_batches, self.replicas
        return np.arange(N).reshape(M, D, -1)[:, blocks.columns(self.mesh)].reshape(-1)

    def _split_rows(self, batch: dict, count: int) -> dict:
        if count != len(self.rows) or "weights" in batch:
            raise DataError(
                f"this process works on {len(self.rows)} of the {self.batch_size} examples of a "
                f"batch, got {count} with keys {sorted(batch)}; give all of `rows`, unweighted"
            )
        example = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), self.example
        )
        parts = batches.split(batch, example, self.micro_batches)
        parts["weights"] *= count / self.batch_size
        return blocks.place_batch(self.mesh, parts, blocks.columns(self.mesh))

    def _place(self, parts: PyTree) -> PyTree:
        return blocks.place_batch(self.mesh, parts, list(range(self.replicas)))

    def gradients(self, state: State, parts: dict, step: Any, *, idle_fill: float = 0.0) -> tuple:
        """Traced: ((loss, metrics), gradients, stats) of the micro-batches that `split` made.

        `stats` are the running statistics after this step.
        """
        run = self._program(self.schedule, self.loss, idle_fill=idle_fill)
        progress = 1.0 if self.steps is None else jnp.minimum(step / self.steps, 1.0)
        return run(self._variables(state, step, progress), parts)

    def losses(self, state: State, parts: dict) -> tuple:
        """Traced: (loss, metrics) through the forward-only schedule, in evaluation mode."""
        return self._program(self._forward_schedule, self.loss)(self._variables(state), parts)

    def outputs(self, state: State, inputs: PyTree) -> PyTree:
        """Traced: the network's outputs [M, D*B, ...] for inputs [M, D*B, ...]."""
        run = self._program(self._forward_schedule, None)
        return run(self._variables(state), {"inputs": inputs})

    def _program(self, schedule: Schedule, loss: Callable | None, **options: Any) -> Callable:
        keys_per = self.keys_per
        return executor.build(self.stages, schedule, self.mesh, loss, keys_per=keys_per, **options)

    def _variables(self, state: State, step: Any = 0, progress: Any = 1.0) -> Variables:
        key = step_key(state.seed, step)
        return Variables(state.params, state.stats, key, jnp.asarray(progress, float))

    @functools.cached_property
    def _forward_schedule(self) -> Schedule:
        return forward_only(self.mesh.shape[STAGE], self.micro_batches, self.schedule.chunks)

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable]:
        names = ("gradients", "losses", "outputs")
        return {name: jax.jit(getattr(self, name)) for name in names}

    def value_and_grad(self, state: State, batch: dict, step: int = 0) -> tuple:
        """((loss, metrics), gradients, state) of a batch.

        The loss and the metrics are weighted means over the batch, seen by every host. Gradients
        have the form of `state.params`, in float32; `to_layers` gives them layer by layer. `step`
        seeds dropout. The returned state has the running statistics after this step.
        """
        parts = self.training_split(batch)
        result, grads, stats = self._jitted["gradients"](state, parts, np.uint32(step))
        return result, grads, state._replace(stats=stats)

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
        params, stats = (
            [of_all_devices(s.local_shapes(), self.stages.devices) for s in storages]
            for storages in (self.stages.params, self.stages.stats)
        )
        seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
        state = jax.tree.map(shape, State(params, stats, seed), self.state_shardings())
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
