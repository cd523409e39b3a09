"""`Pipeline`: a sequence of layers on a mesh, and one exact training step of it.

`Pipeline.value_and_grad` is equal to `sequential.value_and_grad` of the same layers, whatever the
number of stages, replicas and micro-batches, and whatever the schedule.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.mesh import DATA, STAGE, check_axes, is_shared, platform_of
from gpipe_jax.errors import DataError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.losses import weighted_sums
from gpipe_jax.partition import balance, costs
from gpipe_jax.pipeline import executor, memory, spmd, summary
from gpipe_jax.pipeline import micro_batches as batches
from gpipe_jax.pipeline import remat as remats
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.executor import Variables
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.state import State
from gpipe_jax.schedules.generators import forward_only, training_schedule
from gpipe_jax.schedules.schedule import Schedule
from gpipe_jax.utils import choices, trees
from gpipe_jax.utils.trees import PyTree, describe


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
        self.remat = remats.by_name(remat)
        if keys_per not in choices.KEYS_PER:
            known = " or ".join(map(repr, choices.KEYS_PER))
            raise ValueError(f"`keys_per` must be {known}, got {keys_per!r}")
        if steps is not None and steps < 1:
            raise ValueError(f"`steps` of the training run must be at least 1, got {steps}")
        self.layers, self.loss, self.mesh = tuple(layers), loss, mesh
        self.micro_batches = micro_batches
        if not self.layers:
            raise ValueError("`layers` is empty; give at least one layer for each stage")
        check_axes(mesh)
        self.keys_per, self.steps = keys_per, steps
        self.schedule = training_schedule(schedule, mesh.shape[STAGE], micro_batches, chunks)
        self.example = batches.shapes_of(example, mesh.shape[DATA], micro_batches)
        self.one_micro_batch = jax.tree.map(self._micro_batch_shape, self.example)
        self.shapes = infer_shapes(self.layers, self.one_micro_batch["inputs"])
        self._check_loss()
        platform = platform_of(mesh)
        self.costs = costs.measure(self.shapes, cost, platform, shared=is_shared(mesh))
        self.partition = balance.cut(
            partition,
            self.costs,
            self.shapes,
            stages=mesh.shape[STAGE] * self.schedule.chunks,
            # Costs that the caller gave are in a unit of their own: nothing to add to them.
            transfer=costs.transfer_s(self.costs, platform) if isinstance(cost, str) else None,
            kept_bytes=[
                self.remat.layer_bytes(c, trees.tree_bytes(shape.boundary))
                for c, shape in zip(self.costs, self.shapes, strict=True)
            ],
            memory_limit=memory_limit,
        )
        self.stages = Stages(
            self.shapes,
            self.partition.layer_ranges,
            chunks=self.schedule.chunks,
            remat=self.remat,
        )
        self.memory_limit = memory_limit
        if memory_limit is not None:
            memory.check(self.device_bytes(), memory_limit)

    # --- making ---------------------------------------------------------------------------------

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

    def device_bytes(self, optimizer_bytes: int | None = None) -> dict[str, int]:
        """What every device holds, by part, estimated from shapes: bytes. See `memory`.

        The optimizer is taken for one with two slots for each parameter, if nothing is said.
        """
        if optimizer_bytes is None:
            optimizer_bytes = 2 * memory.float32_bytes(self.stages)
        return memory.of_device(
            self.stages,
            self.costs,
            self.schedule,
            optimizer_bytes=optimizer_bytes,
            loss_bytes=self.loss_bytes(),
            batch_bytes=self.micro_batches * trees.tree_bytes(self.one_micro_batch),
        )

    def loss_bytes(self) -> int:
        """Bytes that the loss of a micro-batch works with, on one replica."""
        one, outputs = self.one_micro_batch, self.shapes[-1].output
        return costs.loss_bytes(self.loss, outputs, one["labels"], one["weights"])

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
        return states.init(self.stages, self.mesh, seed)

    def state_shardings(self) -> State:
        """Where the parts of a state lie."""
        return states.shardings(self.stages, self.mesh)

    def to_layers(self, tree: PyTree) -> list[PyTree]:
        """Parameters or gradients as L trees of numpy arrays in layer order, for any K the same.

        `tree` is a `State`, or anything in the form of its `params`. A tied parameter is in its
        first layer, and None in the others. Every stage must be on a device of this process.
        """
        return states.to_layers(self.stages, self.mesh, tree)

    def statistics(self, state: State) -> list[PyTree]:
        """Running statistics as L trees of numpy arrays in layer order, for any K the same."""
        return states.statistics(self.stages, self.mesh, state)

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
        return states.from_layers(self.stages, self.mesh, params, statistics, seed)

    def mask_parameters(self, chosen: Callable[[tuple[int, ...]], bool]) -> PyTree:
        """Traced: which parameters are `chosen` by their shapes, in the rectangular form."""
        return spmd.mask_parameters(self.stages, self.mesh, chosen)

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
        return np.arange(N).reshape(M, D, -1)[:, host_arrays.columns(self.mesh)].reshape(-1)

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
        return host_arrays.place_batch(self.mesh, parts, host_arrays.columns(self.mesh))

    def _place(self, parts: PyTree) -> PyTree:
        return host_arrays.place_batch(self.mesh, parts, list(range(self.replicas)))

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
        M, split = self.micro_batches, NamedSharding(self.mesh, P(None, DATA))

        def part(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (M, a.shape[0] // M, *a.shape[1:])
            return jax.ShapeDtypeStruct(shape, a.dtype, sharding=split)

        step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=NamedSharding(self.mesh, P()))
        state = states.abstract(self.stages, self.mesh)
        return state, jax.tree.map(part, self.example), step

    def lower(self) -> jax.stages.Lowered:
        """`gradients` lowered for the mesh's devices, from shapes, to compile and to measure."""
        return self._jitted["gradients"].lower(*self.abstract_arguments())

    # --- report ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return summary.as_text(self)

    def _repr_html_(self) -> str:
        return summary.as_html(self)
