"""Define `Pipeline`: a sequence of layers on a mesh, and exact training steps of it.

`Pipeline.value_and_grad` is equal to `sequential.value_and_grad` of the same layers, for any number
of devices, chunks, replicas and micro-batches, and any schedule.

Letters: K devices along the stage axis, V chunks, D replicas, L layers, N examples of a batch,
M micro-batches, B examples of a micro-batch on one replica.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.distributed import host_arrays
from gpipe_jax.distributed.mesh import (
    MeshLike,
    check_axes,
    check_platform,
    is_shared,
    num_devices,
    num_replicas,
    platform_of,
    replicated_sharding,
)
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.layers import leaf_names
from gpipe_jax.layers.layer import Layer, check_layers
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.layers.shape_inference import LayerShape, infer_shapes
from gpipe_jax.layers.sources.from_module import to_module
from gpipe_jax.losses.weighting import HasCount, count_elements, weighted_sums
from gpipe_jax.partition import balance, costs, solver
from gpipe_jax.pipeline import executor, memory
from gpipe_jax.pipeline import remat as remats
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.batches import checks
from gpipe_jax.pipeline.batches import micro_batches as batches
from gpipe_jax.pipeline.executor import Variables
from gpipe_jax.pipeline.prediction import Predictor, Shapes
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.results import (
    ExtrasValueAndGrad,
    GradientArguments,
    LossAndMetrics,
    StepGradients,
    ValueAndGrad,
    Weighted,
    weighted_mean,
)
from gpipe_jax.pipeline.state import State, TrainState
from gpipe_jax.pipeline.summary import Summary, summarize
from gpipe_jax.schedules.generators import forward_only, training_schedule
from gpipe_jax.schedules.schedule import Schedule
from gpipe_jax.utils import choices
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.trees import PyTree, describe, tree_bytes
from gpipe_jax.utils.xla_workarounds import jax_setting


class Pipeline:
    """Train a network in K V stages on a mesh of K devices along the stage axis, and D replicas.

    The network is divided into stages of balanced cost. Each stage is on the devices of one row
    of the mesh. A batch is divided into micro-batches, which pass through the stages one after
    the other (GPipe, arXiv:1811.06965, section 2.2). The backward pass recomputes each stage from
    its input (section 2.3).

    Building a pipeline allocates nothing on any device. So the mesh may be a compile-only or an
    abstract one.

    Args:
        layers: Sequence of L layers from `gpipe_jax.layer`. Each takes one tree of arrays and
            returns one.
        loss: Function (outputs, labels) -> losses [B] of the examples, or (losses, metrics); see
            `gpipe_jax.losses`.
        mesh: K x D devices, from `gpipe_jax.make_mesh`.
        example: A batch, or its shapes: {"inputs": tree, "labels": tree} and, optionally,
            "weights": [N] and "extras": {name: tree}, which layers read (see `Layer.read`). The
            first axis of every array is the N examples. N must be a multiple of D M. Later batches
            may be shorter: they are padded with examples of weight zero.
        micro_batches: M, the number of micro-batches of a batch. Default: 1.
        schedule: "gpipe", "1f1b", "eager_1f1b", "interleaved", or a `Schedule` of your own; see
            `gpipe_jax.schedules`. Default: "1f1b".
        partition: "auto", which minimizes the cost of the slowest stage, or the first layer of each
            stage but the first, as K V - 1 increasing indices. Default: "auto".
        cost: What "auto" balances: "flops" (counted), "time" (measured on this machine), or L
            numbers in any unit. Default: "flops".
        platform: What the operations are counted for, "cpu", "gpu" or "tpu"; their numbers differ.
            Default: the platform of the mesh.
        memory_limit: The most bytes that a device may hold: parameters, gradients and two optimizer
            slots (padding included), stashed inputs, and the working set of a stage. None sets no
            limit. Default: None.
        remat: "stage" recomputes each stage once, from its input. "layer" recomputes each layer of
            it once more, for less memory and about a third more time. Default: "stage".
        chunks: V, the number of stages on each device. More than one needs the schedule
            "interleaved". Default: 1.
        keys_per: Granularity of dropout keys, "micro_batch" or "example". With "example" the result
            does not depend on M and D. Default: "micro_batch".
        steps: Length of the training run in steps, for layers that change during it (drop-path).
            None means that training is at its end. Default: None.
        trainable: Patterns of the parameters to train: "9" is layer 9, "Dense" every Dense layer,
            "*.bias" every bias, and "encoder" this part of a model of `from_module`. All others
            are frozen: they have no gradient and no optimizer state. Running statistics of a frozen
            `nnx.BatchNorm` still move, unless the instance has `use_running_average=True`.
            Default: None, which trains all parameters.
        frozen: Patterns of the parameters not to train, instead of `trainable`. Default: None.

    Attributes:
        replicas: D, the number of copies of the pipeline.
        batch_size: N, the examples of a batch.
        micro_batch_size: B, the examples of a micro-batch on one replica.
        shapes: The shapes of each layer.
        costs: The cost of each layer.
        cost_kind: What these costs are, such as "operations, counted for cpu".
        stages: The stages, with the form of their arrays.

    Raises:
        ValueError: An argument is invalid, layers do not fit each other or the loss, or a device
            needs more than `memory_limit`.

    Example::

        batch = next(gpipe.data.digits(batch_size=64, seed=0).train(0))
        mesh = gpipe.make_mesh(stages=4, data=2)
        pipe = gpipe.Pipeline(
            gpipe.zoo.mlp((64, 32, 32, 32, 10)),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=mesh,
            example=batch,
            micro_batches=4,
        )
        state = pipe.init(seed=0)
        (loss, metrics), gradients, state = pipe.value_and_grad(state, batch)
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        loss: Callable,
        mesh: MeshLike,
        example: dict,
        micro_batches: int = 1,
        schedule: str | Schedule = "1f1b",
        partition: str | Sequence[int] = "auto",
        cost: str | Sequence[float] = "flops",
        platform: str | None = None,
        memory_limit: float | None = None,
        remat: str = "stage",
        chunks: int = 1,
        keys_per: str = "micro_batch",
        steps: int | None = None,
        trainable: Sequence[str] | None = None,
        frozen: Sequence[str] | None = None,
    ) -> None:
        self.remat = remats.by_name(remat)
        if keys_per not in choices.KEYS_PER:
            known = " or ".join(map(repr, choices.KEYS_PER))
            raise ArgumentError("keys_per", f"`keys_per` must be {known}, got {keys_per!r}")
        if steps is not None:
            steps = check_count("steps", steps)
        micro_batches = check_count("micro_batches", micro_batches)
        check_layers(layers)
        self.layers, self.loss, self.mesh = tuple(layers), loss, mesh
        self.micro_batches = micro_batches
        self._enable_x64 = jax_setting("jax_enable_x64")
        if not self.layers:
            raise ArgumentError(
                "layers", "`layers` is empty; give at least one layer for each stage"
            )
        check_axes(mesh)
        self.keys_per, self.steps, self.memory_limit = keys_per, steps, memory_limit
        self.schedule = training_schedule(schedule, num_devices(mesh), micro_batches, chunks)
        self.replicas = num_replicas(mesh)
        self.example = batches.shapes_of(example, self.replicas, micro_batches)
        self.batch_size = self.example["weights"].shape[0]
        self.micro_batch_size = self.batch_size // (self.replicas * micro_batches)
        self.micro_batch_shapes = batches.resize(self.example, self.micro_batch_size)
        self._trainable, self._frozen = trainable, frozen
        self.shapes = self._infer(self.micro_batch_shapes)
        self._check_loss()
        platform = check_platform(platform, platform_of(mesh))
        self.cost_kind = costs.describe(cost, platform)
        self.costs = costs.measure(self.shapes, cost, platform, shared=is_shared(mesh))
        self.partition = self._cut(partition, self.costs, cost, platform)
        self.stages = self._divide(self.shapes)
        if memory_limit is not None:
            memory.check(self.device_bytes(), memory_limit)

    def _infer(self, micro_batch: dict) -> list[LayerShape]:
        """Return the shapes of the layers for a micro-batch, divided into trained and frozen."""
        shapes = infer_shapes(self.layers, micro_batch["inputs"], micro_batch["extras"])
        return leaf_names.freeze(shapes, self._trainable, self._frozen)

    def _divide(self, shapes: Sequence[LayerShape]) -> Stages:
        """Divide the layers into the pipeline's stages, for these shapes."""
        return Stages(
            shapes,
            self.partition.layer_ranges,
            chunks=self.schedule.chunks,
            remat=self.remat,
        )

    def _cut(
        self, partition: Any, layer_costs: list[costs.LayerCost], kind: Any, platform: str
    ) -> solver.Partition:
        return balance.cut(
            partition,
            layer_costs,
            self.shapes,
            stages=num_devices(self.mesh) * self.schedule.chunks,
            chunks=self.schedule.chunks,
            # Costs from the caller have an unknown unit: no time can be added to them.
            transfer=costs.transfer_s(layer_costs, platform) if isinstance(kind, str) else None,
            kept_bytes=[
                self.remat.layer_bytes(c, tree_bytes(shape.boundary))
                for c, shape in zip(layer_costs, self.shapes, strict=True)
            ],
            memory_limit=self.memory_limit,
        )

    def cut_on(self, platform: str, cost: str | Sequence[float] = "flops") -> tuple[int, ...]:
        """Return where "auto" would cut this network on another platform.

        Args:
            platform: "cpu", "gpu" or "tpu".
            cost: What to balance: "flops", or L numbers. Default: "flops".

        Returns:
            The first layer of each stage but the first.
        """
        layer_costs = costs.measure(self.shapes, cost, platform)
        return self._cut("auto", layer_costs, cost, platform).boundaries

    def _check_loss(self) -> None:
        """Evaluate the loss abstractly, to find a mismatch before anything compiles."""
        outputs, labels = self.shapes[-1].output, self.micro_batch_shapes["labels"]
        weights = self.micro_batch_shapes["weights"]
        try:
            jax.eval_shape(functools.partial(weighted_sums, self.loss), outputs, labels, weights)
            jax.eval_shape(functools.partial(count_elements, self.loss), labels, weights)
        except ArgumentError:  # it already names what is wrong, such as a further metric
            raise
        except Exception as error:
            raise ArgumentError(
                "loss",
                f"`loss` does not take the outputs of layer {len(self.layers) - 1}, "
                f"{self.layers[-1]}: {describe(outputs)}, with labels {describe(labels)}: {error}",
            ) from error

    def _check_settings(self) -> None:
        """Check that the types of the layers are still those that the stages were made for."""
        now = jax_setting("jax_enable_x64")
        if now != self._enable_x64:
            raise ValueError(
                f"`jax_enable_x64` is {now}, but was {self._enable_x64} when this pipeline was "
                f"built, and the types of its layers depend on it; set it back, or build a "
                f"pipeline anew"
            )

    # --- parameters ------------------------------------------------------------------------------

    def init(self, seed: int = 0) -> State:
        """Initialize the parameters, each on its own device.

        Args:
            seed: Seed of the parameters and of all randomness in training. Default: 0.

        Returns:
            The state. It is the same for every K, V, D and schedule.
        """
        self._check_settings()
        return states.init(self.stages, self.mesh, seed)

    def to_layers(self, tree: PyTree) -> list[PyTree]:
        """Copy parameters or gradients into L trees of numpy arrays, in layer order.

        The trees are the same for any K. A tied parameter is in its first layer, and None in the
        others. Frozen parameters are in the trees of a state, and None in those of gradients.

        Args:
            tree: A `State`, or anything in the form of its `params`.

        Returns:
            A list of L trees.

        Raises:
            ValueError: A stage is on no device of this process.
            ArgumentError: The state cannot be used; see `check_state`.
        """
        if isinstance(tree, State | TrainState):
            states.check(tree, self._abstract_state)
        return states.to_layers(self.stages, self.mesh, tree)

    def statistics(self, state: State) -> list[PyTree]:
        """Copy the running statistics of batch norms into L trees of numpy arrays.

        Args:
            state: The state of training.

        Returns:
            A list of L trees in layer order. They are the same for any K. The tree of a layer
            without batch norm is empty.

        Raises:
            ValueError: A stage is on no device of this process.
            ArgumentError: The state cannot be used; see `check_state`.
        """
        self.check_state(state)
        return states.statistics(self.stages, self.mesh, state)

    def from_layers(
        self,
        params: Sequence[PyTree],
        seed: int = 0,
        *,
        statistics: Sequence[PyTree] | None = None,
    ) -> State:
        """Make a state with given parameters: the inverse of `to_layers` and `statistics`.

        Args:
            params: L trees of arrays, in layer order.
            seed: Seed of all randomness in training. Default: 0.
            statistics: L trees of running statistics. Default: initial ones.

        Returns:
            The state, on the devices of the mesh.

        Raises:
            ValueError: A tree does not have the shapes and types of its layer.
        """
        self._check_settings()
        return states.from_layers(self.stages, self.mesh, params, statistics, seed)

    def check_state(self, state: State) -> None:
        """Check that a state is of this pipeline; every method that takes one does this.

        Args:
            state: The state of training.

        Raises:
            ArgumentError: It is no `State`, a training step has updated it in place, or it is of a
                pipeline of another layout, network or choice of frozen parameters.
        """
        states.check(state, self._abstract_state)

    @functools.cached_property
    def _abstract_state(self) -> State:
        return states.abstract(self.stages, self.mesh)

    def to_module(self, state: State) -> Any:
        """Return the model that the layers were made from, with the values of a state.

        Args:
            state: The state of training.

        Returns:
            A copy of the model that `gpipe_jax.from_module` divided.

        Raises:
            ArgumentError: A layer is not from `from_module`, or from another model.
        """
        return to_module(self.layers, self.to_layers(state), self.statistics(state))

    # --- batches ---------------------------------------------------------------------------------

    def split(self, batch: dict, *, train: bool = False) -> dict:
        """Divide a batch into micro-batches, and place them on the devices.

        A batch of fewer than N examples is padded with examples of weight zero. An example of
        weight zero takes the values of the first one of positive weight, so that it cannot make a
        gradient NaN. In training, a network with batch norm keeps its inputs, and counts them; it
        is padded with the inputs of the batch once more, in their order.

        Args:
            batch: The batch, in numpy. For training on several processes, if this process has
                devices of some replicas only, it is the examples `rows` of the full batch.
            train: Whether the batch is for training. Default: False.

        Returns:
            Arrays [M, D*B, ...], with weights that sum to one.

        Raises:
            DataError: The batch does not look like the example, or holds numbers that the
                example's types do not.
        """
        own = None
        replicas = list(range(self.replicas))
        if train and len(self.rows) < self.batch_size:
            own, replicas = len(self.rows), host_arrays.local_replicas(self.mesh)
        batch_norm = any(jax.tree.leaves(shape.stats) for shape in self.shapes)
        micro_batched = batches.split(
            batch,
            self.example,
            self.micro_batches,
            own_examples=own,
            all_rows_count=train and batch_norm,
        )
        return host_arrays.place_batch(self.mesh, micro_batched, replicas)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Return the positions in a batch of the examples that this process works on."""
        N, M, D = self.batch_size, self.micro_batches, self.replicas
        return np.arange(N).reshape(M, D, -1)[:, host_arrays.local_replicas(self.mesh)].reshape(-1)

    # --- one step --------------------------------------------------------------------------------

    def value_and_grad(self, state: State, batch: dict, step: int = 0) -> ValueAndGrad:
        """Compute the loss and the gradients of a batch.

        Args:
            state: Parameters, running statistics and seed.
            batch: A batch like `example`; see `split`.
            step: Number of the step from 0; with the seed it determines dropout. Default: 0.

        Returns:
            A tuple ((loss, metrics), gradients, state). Loss and metrics are weighted means over
            the batch. The gradients have the form of `state.params` and are at least float32;
            `to_layers` returns them layer by layer. The state has new running statistics.
        """
        self.check_state(state)
        micro_batched = self.split(batch, train=True)
        result = self._jitted["gradients"](state, micro_batched, np.uint32(step))
        return ValueAndGrad(result.value, result.gradients, state._replace(stats=result.stats))

    def value_and_grad_with_extras(
        self, state: State, batch: dict, extras: Sequence[str], step: int = 0
    ) -> ExtrasValueAndGrad:
        """Compute the loss and the gradients of a batch, also those of its extras.

        Use it where another program computes an extra, such as the encoder of a condition: its
        backward pass starts from this gradient.

        Args:
            state: Parameters, running statistics and seed.
            batch: A batch like `example`; see `split`.
            extras: Names of extras of floating-point numbers.
            step: Number of the step from 0; with the seed it determines dropout. Default: 0.

        Returns:
            A tuple ((loss, metrics), gradients, state, gradients of the extras by name). Those of
            an extra have the shape of `batch["extras"][name]`, and are at least float32. On several
            processes they are of all N examples, whatever part of the batch each process gives.

        Raises:
            ArgumentError: A name is not that of an extra of floating-point numbers.

        Example::

            def apply(params, x, *, shift):
                return x + shift

            shifted = gpipe.layer(lambda key, x: {}, apply).read("shift")
            batch = {**batch, "extras": {"shift": 0.5 * batch["inputs"]}}
            loss, mesh = gpipe.losses.softmax_cross_entropy, gpipe.make_mesh(stages=2)
            pipe = gpipe.Pipeline([shifted, *layers], loss=loss, mesh=mesh, example=batch)
            result = pipe.value_and_grad_with_extras(pipe.init(), batch, ["shift"])
            result.extras["shift"].shape  # that of the inputs
        """
        self.check_state(state)
        names = checks.differentiable_extras(extras, self.example)
        micro_batched = self.split(batch, train=True)
        run = self._jitted["gradients_with_extras"]
        result, of_extras = run(state, micro_batched, np.uint32(step), names)
        # Split has checked the batch. If it is only this process's part, the result is of all N.
        count = checks.count_examples(checks.arrays(batch)["inputs"])
        count = self.batch_size if count == len(self.rows) else count
        return ExtrasValueAndGrad(
            result.value,
            result.gradients,
            state._replace(stats=result.stats),
            self._jitted["join"](of_extras, count),
        )

    def evaluate(self, state: State, batch: dict) -> LossAndMetrics:
        """Compute the loss of a batch in evaluation mode.

        Args:
            state: Parameters and running statistics.
            batch: A batch like `example`, of any number of examples. More than N are evaluated N at
                a time.

        Returns:
            A tuple (loss, metrics): weighted means over the examples, or over the elements that
            count if the loss counts them.

        Raises:
            DataError: The batch does not look like the example, or nothing in it counts.
        """
        parts = list(self.evaluate_parts(state, batch))
        total, means = weighted_mean(parts)
        if not total:
            raise DataError("the loss counts nothing in this batch; give at least one such element")
        if len(parts) == 1:
            return parts[0].value
        loss, *metrics = (jnp.asarray(mean) for mean in means.values())
        return LossAndMetrics(loss, dict(zip(parts[0].value.metrics, metrics, strict=True)))

    def evaluate_parts(self, state: State, batch: dict) -> Iterator[Weighted]:
        """Evaluate a batch in parts of at most N examples.

        Args:
            state: Parameters and running statistics.
            batch: A batch like `example`, of any number of examples.

        Yields:
            The loss and the metrics of each part that counts, with its weight: the sum over its
            examples, with the counts of the loss.
        """
        self.check_state(state)
        batch = checks.complete(checks.arrays(batch))
        checks.total_weight(batch)
        for part in batches.parts(batch, self.batch_size):
            if part["weights"].any():
                micro_batched, weight = self.split(part), checks.total_weight(part)
                if isinstance(self.loss, HasCount):
                    weight *= float(self._jitted["counts"](micro_batched))
                value = self._jitted["losses"](state, micro_batched)
                yield Weighted(weight, jax.block_until_ready(value))

    def predict(
        self, state: State, inputs: PyTree, extras: Mapping[str, PyTree] | None = None
    ) -> PyTree:
        """Return the outputs of the network in evaluation mode, for any number of examples.

        Other axes than the first may differ from the example's, if no parameter depends on them:
        the length of a sequence, or the size of an image. New shapes are compiled once.

        Args:
            state: Parameters and running statistics.
            inputs: A tree of arrays like `example["inputs"]`. More than N examples are computed N
                at a time; fewer are padded.
            extras: Arrays like `example["extras"]`, for the same examples. Default: none.

        Returns:
            The outputs, whose first axis is the examples.

        Raises:
            DataError: The inputs or extras have another structure, types that do not fit, or shapes
                that the network does not take.

        Example::

            state = pipe.init(seed=0)
            logits = pipe.predict(state, images[:3])
        """
        self.check_state(state)
        named = checks.named_extras(extras)
        return self._predictor(state, checks.arrays({"inputs": inputs, "extras": named}))

    @functools.cached_property
    def _predictor(self) -> Predictor:
        return Predictor(
            self.mesh,
            self.micro_batches,
            self.replicas,
            Shapes(self.example, self.micro_batch_shapes, self.shapes),
            self.stages,
            infer=self._infer,
            divide=self._divide,
            outputs=self._outputs,
        )

    # --- traced ----------------------------------------------------------------------------------

    def gradients(
        self, state: State, micro_batched: dict, step: Any, *, idle_fill: float = 0.0
    ) -> StepGradients:
        """Compute what `value_and_grad` returns, within a traced function.

        Args:
            state: Parameters, running statistics and seed.
            micro_batched: What `split` returns for training.
            step: Number of the step from 0.
            idle_fill: What buffers hold before anything arrives, for tests. Default: 0.

        Returns:
            A tuple ((loss, metrics), gradients, stats).
        """
        return self._gradients(state, micro_batched, step, idle_fill=idle_fill)[0]

    def _gradients(
        self,
        state: State,
        micro_batched: dict,
        step: Any,
        extras: Sequence[str] = (),
        *,
        idle_fill: float = 0.0,
    ) -> tuple[StepGradients, dict[str, PyTree]]:
        """Return also the gradients of some extras, each [M, D*B, ...] in float32 at least."""
        run = self._program(self.schedule, self.loss, extras_gradients=extras, idle_fill=idle_fill)
        progress = 1.0 if self.steps is None else jnp.minimum(step / self.steps, 1.0)
        variables = self._variables(state, step, progress)
        value, grads, stats, of_extras = run(variables, micro_batched)
        return StepGradients(LossAndMetrics(*value), grads, stats), of_extras

    def losses(self, state: State, micro_batched: dict) -> LossAndMetrics:
        """Compute what `evaluate` returns, within a traced function.

        Args:
            state: Parameters and running statistics.
            micro_batched: What `split` returns.

        Returns:
            A tuple (loss, metrics): weighted means over the examples.
        """
        run = self._program(self._forward_schedule, self.loss)
        return LossAndMetrics(*run(self._variables(state), micro_batched))

    def _counts(self, micro_batched: dict) -> jax.Array:
        """Return what the examples count together, traced; their weights sum to one."""
        count = jax.vmap(functools.partial(count_elements, self.loss))
        return count(micro_batched["labels"], micro_batched["weights"]).sum()

    def _outputs(self, stages: Stages, state: State, micro_batched: dict) -> PyTree:
        """Return the network's outputs [M, D*B, ...] for inputs [M, D*B, ...], traced."""
        run = self._program(self._forward_schedule, None, stages=stages)
        return run(self._variables(state), micro_batched)

    def _program(
        self,
        schedule: Schedule,
        loss: Callable | None,
        *,
        stages: Stages | None = None,
        **options: Any,
    ) -> Callable:
        self._check_settings()
        stages = self.stages if stages is None else stages
        keys_per = self.keys_per
        return executor.build(stages, schedule, self.mesh, loss, keys_per=keys_per, **options)

    def _variables(self, state: State, step: Any = 0, progress: Any = 1.0) -> Variables:
        key = step_key(state.seed, step)
        return Variables(state.params, state.stats, state.fixed, key, jnp.asarray(progress, float))

    @functools.cached_property
    def _forward_schedule(self) -> Schedule:
        return forward_only(num_devices(self.mesh), self.micro_batches, self.schedule.chunks)

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable]:
        return {
            "gradients": jax.jit(self.gradients),
            "gradients_with_extras": jax.jit(self._gradients, static_argnums=3),
            "losses": jax.jit(self.losses),
            "join": jax.jit(batches.join, static_argnums=1),
            "counts": jax.jit(self._counts, out_shardings=replicated_sharding(self.mesh)),
        }

    # --- from shapes alone -----------------------------------------------------------------------

    def lower(self) -> jax.stages.Lowered:
        """Lower `gradients` for the devices of the mesh, from shapes, to compile or to inspect.

        Returns:
            The lowered function, like the result of `jax.jit(...).lower`.
        """
        return self._jitted["gradients"].lower(*self.abstract_arguments())

    def abstract_arguments(self) -> GradientArguments:
        """Return the shapes and shardings of the arguments of `gradients`."""
        micro_batched = batches.abstract(self.example, self.micro_batches, self.mesh)
        step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated_sharding(self.mesh))
        return GradientArguments(self._abstract_state, micro_batched, step)

    def device_bytes(self, optimizer_bytes: int | None = None) -> dict[str, int]:
        """Estimate what every device holds during a step; see `pipeline.memory`.

        Args:
            optimizer_bytes: Bytes of the optimizer's state on a device. Default: two float32 slots
                for each parameter.

        Returns:
            The bytes by part: "parameters", "optimizer", "gradients", "stash", "working_set" and
            "batch".
        """
        if optimizer_bytes is None:
            optimizer_bytes = 2 * memory.float32_bytes(self.stages)
        return memory.of_device(
            self.stages,
            self.costs,
            self.schedule,
            loss=self.loss,
            micro_batch=self.micro_batch_shapes,
            optimizer_bytes=optimizer_bytes,
        )

    def summary(self) -> Summary:
        """Summarize the stages and the facts of the pipeline; `print` shows the same.

        Returns:
            A table of the stages, and facts as a dict.
        """
        return summarize(
            self.stages,
            self.partition,
            self.schedule,
            cost_kind=self.cost_kind,
            replicas=self.replicas,
            batch_size=self.batch_size,
        )

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()
