"""Train a pipeline: steps, optimizer updates and evaluation, without config files."""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import export

from gpipe_jax.checkpoint import by_layer
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.distributed import processes
from gpipe_jax.distributed.mesh import params_sharding, replicated_sharding
from gpipe_jax.errors import DataError, DivergedError
from gpipe_jax.pipeline import memory, spmd
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.results import Weighted, weighted_mean
from gpipe_jax.pipeline.state import State, TrainArrays, TrainState
from gpipe_jax.training.divergence import Divergence
from gpipe_jax.training.grouping.transformation import on_packed
from gpipe_jax.training.optimizers import decays, map_parameters, moving_average
from gpipe_jax.training.profiling import Timings
from gpipe_jax.utils.trees import PyTree, tree_bytes, wide

Record = Callable[[dict], None]

# Steps that may be in progress at once: enough to hide Python, few enough that jax 0.10's CPU
# collectives cannot deadlock, and that a loss that is not finite is noticed soon.
IN_FLIGHT = 8


def never(step: int) -> bool:
    """Return False: do not stop before this step."""
    return False


class Updated(NamedTuple):
    """Hold what the optimizer's update replaces, or its shapes."""

    opt_state: PyTree
    average: PyTree  # moving average of the parameters; None without one
    params: PyTree


class StepArguments(NamedTuple):
    """Hold the arguments of the compiled step, or their shapes and shardings."""

    arrays: TrainArrays  # updated in place
    micro_batched: dict  # see `Pipeline.split`
    step: Any  # updates done before, uint32 []


class StepsInFlight:
    """Hold the steps that have been started, and record each when it has finished."""

    def __init__(self, divergence: Divergence, record: Record) -> None:
        self._divergence, self._record = divergence, record
        self._steps: deque[tuple[int, dict, float]] = deque()
        self._clock = time.perf_counter()

    def add(self, step: int, metrics: dict, start_s: float) -> None:
        """Add a step that took `start_s` to start; wait for the oldest one if there are many."""
        self._steps.append((step, metrics, start_s))
        if len(self._steps) >= IN_FLIGHT:
            self._finish_oldest()

    def finish_all(self) -> None:
        """Wait for all steps."""
        while self._steps:
            self._finish_oldest()

    @contextlib.contextmanager
    def finished_before_errors(self) -> Iterator[None]:
        """Finish all steps before an error of the block is raised: they may have diverged."""
        try:
            yield
        except Exception:
            self.finish_all()
            raise

    def _finish_oldest(self) -> None:
        step, metrics, start_s = self._steps.popleft()
        values = {name: float(value) for name, value in metrics.items()}
        self._divergence.check_loss("loss", step, values["loss"])
        self._divergence.last_loss, now = values["loss"], time.perf_counter()
        self._record({"step": step, **values, "step_time_s": max(now - self._clock, start_s)})
        self._clock = now


class Trainer:
    """Train a pipeline with an optimizer.

    Args:
        pipe: The pipeline.
        tx: An optax transformation that acts on each element alone, and global norms. Masks and
            labels of parameters are for the list of trees that `pipe.to_layers` returns. Adafactor
            and LAMB mix elements, so their result would depend on the number of stages.
        ema: Decay of a moving average of the parameters, in (0, 1); `evaluated` returns the average
            then. None keeps no average. Default: None.

    Attributes:
        pipe: The pipeline.
        tx: The optax transformation.
        ema: The decay of the moving average, or None.
        reached: The training state of the completed steps, if an error ended `fit`; else None.
        timings: Seconds spent on data and on compilation.
        local_shapes: The shapes of the arrays that one device holds.

    Raises:
        ValueError: `tx` mixes elements or takes another tree, or a device needs more than the
            pipeline's `memory_limit`.

    Example::

        mesh = gpipe.make_mesh(stages=2)
        data = gpipe.data.digits(batch_size=64, seed=0)
        pipe = gpipe.Pipeline(
            gpipe.zoo.convnet((4, 4), (1, 1)),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=mesh,
            example=next(data.train(0)),
            micro_batches=2,
        )
        trainer = gpipe.Trainer(pipe, optax.adam(1e-3), ema=0.999)
        current = trainer.init(seed=0)
        current = trainer.fit(current, data.train(0), steps=3, record=print)
        print(trainer.evaluate(trainer.evaluated(current), data.test()))
    """

    def __init__(
        self, pipe: Pipeline, tx: optax.GradientTransformation, *, ema: float | None = None
    ) -> None:
        self.pipe, self.ema = pipe, ema
        self.tx = on_packed(tx, pipe.stages.params, pipe.mesh)
        if pipe.memory_limit is not None:
            memory.check(self.device_bytes(), pipe.memory_limit)
        self.timings, self._compiled = Timings(), set[str]()
        self.reached: TrainState | None = None
        self._divergence = Divergence(pipe.mesh)
        # Everything is updated in place and stays where it is. A result with another sharding (on
        # a mesh of one device) would compile the second step again.
        outputs = (self._shardings(), None)
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=outputs)

    # --- the training state ----------------------------------------------------------------------

    def init(self, seed: int = 0) -> TrainState:
        """Initialize the parameters and the optimizer.

        Args:
            seed: Seed of the parameters and of all randomness in training. Default: 0.

        Returns:
            The training state before the first step.
        """
        return self.start(self.pipe.init(seed))

    def start(self, state: State, step: int = 0) -> TrainState:
        """Initialize the optimizer for given parameters.

        The first step donates the arrays of `state`, so do not use them after it.

        Args:
            state: Parameters, running statistics and seed.
            step: Number of updates done so far. Default: 0.

        Returns:
            The training state after `step` updates.
        """
        places = self._shardings()
        begin = jax.jit(self._begin, out_shardings=(places.opt_state, places.average))
        opt_state, average = begin(state.params)
        return TrainState(state, opt_state, step, average)

    def _begin(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Return optimizer state and average, in the gradients' types: float32 at least."""
        params = wide(params)
        return self.tx.init(params), None if self.ema is None else params

    @functools.cached_property
    def local_shapes(self) -> TrainArrays:
        """Return the shapes of the arrays that one device holds."""
        state = states.local_shapes(self.pipe.stages)
        return TrainArrays(state, *jax.eval_shape(self._begin, state.params))

    def _shardings(self) -> TrainArrays:
        """Return the shardings of the arrays.

        Arrays in the form of the parameters have their sharding. Every device has a copy of the
        rest.
        """
        mesh, local = self.pipe.mesh, self.local_shapes
        sharded, replicated = params_sharding(mesh), replicated_sharding(mesh)

        def like_params(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda _: sharded, tree)

        def place(tree: PyTree) -> PyTree:
            placed = map_parameters(like_params, tree, local.state.params)
            return jax.tree.map(lambda a: sharded if a is sharded else replicated, placed)

        state = states.shardings(self.pipe.stages, mesh)
        return TrainArrays(state, place(local.opt_state), place(local.average))

    def evaluated(self, current: TrainState) -> State:
        """Return the state to evaluate: with the moving average of the parameters, if there is one.

        Running statistics of batch norms are moving averages already, so they stay as they are.

        Args:
            current: The training state. It stays usable.

        Returns:
            The state for `evaluate`. Without `ema` it is `current.state`.
        """
        if self.ema is None:
            return current.state
        params = jax.tree.map(lambda a, p: a.astype(p.dtype), current.average, current.state.params)
        return current.state._replace(params=params)

    # --- one step --------------------------------------------------------------------------------

    def step(self, current: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        """Do one update.

        Args:
            current: The training state. It is donated, so do not use it again.
            batch: A batch like the pipeline's example; see `Pipeline.split`.

        Returns:
            The new training state, and the loss and the metrics by name. They are arrays that may
            not be ready yet.
        """
        micro_batched = self.pipe.split(batch, train=True)
        with self._compiling("step"):
            arrays, metrics = self._step(current.arrays, micro_batched, np.uint32(current.step))
        return arrays.at_step(current.step + 1), metrics

    def _update(
        self, arrays: TrainArrays, micro_batched: dict, step: jax.Array
    ) -> tuple[TrainArrays, dict[str, jax.Array]]:
        """Compute the whole training step, traced."""
        state, opt_state, average = arrays
        (loss, metrics), grads, stats = self.pipe.gradients(state, micro_batched, step)
        decaying = spmd.mask_parameters(self.pipe.stages, self.pipe.mesh, decays)
        before = Updated(opt_state, average, state.params)
        after = self.apply_gradients(before, grads, step, decaying)
        state = state._replace(params=after.params, stats=stats)
        return TrainArrays(state, after.opt_state, after.average), {"loss": loss, **metrics}

    def apply_gradients(
        self, before: Updated, grads: PyTree, step: jax.Array, decaying: PyTree
    ) -> Updated:
        """Apply an update of the optimizer, within a traced function.

        Args:
            before: The optimizer's state, the moving average and the parameters.
            grads: The gradients, in the form of the parameters.
            step: Number of updates done so far.
            decaying: Which parameters decay, in the form of the parameters.

        Returns:
            The same after the update.
        """
        updates, opt_state = self.tx.update(
            grads, before.opt_state, before.params, decaying=decaying
        )
        params, average = optax.apply_updates(before.params, updates), before.average
        if self.ema is not None:
            average = moving_average(average, params, step, self.ema)
        return Updated(opt_state, average, params)

    def _compiling(self, program: str) -> contextlib.AbstractContextManager:
        """Count the first call of a program as compilation."""
        first = program not in self._compiled
        self._compiled.add(program)
        return self.timings.spend("compile") if first else contextlib.nullcontext()

    # --- many steps ------------------------------------------------------------------------------

    def fit(
        self,
        current: TrainState,
        batches: Iterable[dict],
        steps: int,
        record: Record,
        stopped: Callable[[int], bool] = never,
    ) -> TrainState:
        """Train until `steps` updates are done, earlier ones included.

        After an error other than DivergedError, and after Ctrl-C, `reached` is the state of the
        completed steps: `current = trainer.reached`.

        Args:
            current: The training state. It is donated, so do not use it again.
            batches: Batches like the pipeline's example, from the next step on, as an iterator or a
                list.
            steps: Number of updates at the end.
            record: Function that gets each step's record, in order: "step" (from 1), "loss", the
                metrics of the loss function and "step_time_s". This is the time since the last step
                finished, or the time to start the step if that is longer (devices faster than the
                host).
            stopped: Function (updates done) -> whether to stop before the next step. Default: never
                stop.

        Returns:
            The training state after the last step.

        Raises:
            DivergedError: A loss, or the state after the last step, is not finite.
            DataError: `batches` ends too early, or a batch does not look like the example.
        """
        start, self.reached, batches = current.step, None, iter(batches)
        in_flight = StepsInFlight(self._divergence, record)
        try:
            while current.step < steps and not stopped(current.step):
                with in_flight.finished_before_errors():
                    begun = time.perf_counter()
                    current, metrics = self.step(current, self._next(batches, current.step, steps))
                in_flight.add(current.step, metrics, time.perf_counter() - begun)
            in_flight.finish_all()
            if current.step > start:
                self._check_state(current, start)
        except DivergedError:
            raise
        except BaseException as error:
            if not any(a.is_deleted() for a in jax.tree.leaves(current.arrays)):
                self.reached = current
                error.add_note(
                    f"(the state after step {current.step} is kept; in Python: `trainer.reached`)"
                )
            raise
        return current

    def _next(self, batches: Iterator[dict], step: int, steps: int) -> dict:
        with self.timings.spend("data"):
            batch = next(batches, None)
        if batch is None:
            raise DataError(
                f"`batches` ended after {step} of {steps} steps; give an iterator without end, or "
                f"ask for {step} steps"
            )
        return batch

    def _check_state(self, current: TrainState, since: int) -> None:
        """Raise DivergedError unless the state is finite, as a loss does not show its own step."""
        if not self.is_finite(current):
            raise self._divergence.error(since, current.step, self.to_layers(current))

    def is_finite(self, current: TrainState) -> bool:
        """Check that neither NaN nor infinity is in what training changes.

        Several processes get the same answer, and must call this together.

        Args:
            current: The training state. It stays usable.

        Returns:
            Whether parameters, running statistics, their averages and the optimizer's moments are
            finite.
        """
        if self._divergence.is_finite(current.arrays):
            return True
        # Padding alone may hold NaN: its gradients are zero, and an optimizer may divide by them.
        own_layers = self.to_layers(current).layers.values()
        return processes.all_agree(not any(by_layer.not_finite(tree) for tree in own_layers))

    def evaluate(self, state: State, batches: Iterable[dict]) -> dict[str, float]:
        """Compute loss and metrics over all of `batches`.

        Args:
            state: The state to evaluate; see `evaluated`.
            batches: Batches like the pipeline's example, of any number of examples; such as an
                iterator.

        Returns:
            Weighted means over the examples, or over all elements that the loss counts, as
            "test_loss" and so on.

        Raises:
            DataError: There are no examples, or their weights are negative or not finite.
        """
        total, means = weighted_mean(self._evaluated_parts(state, batches))
        if not total:
            raise DataError("there is nothing to evaluate: the held-out data has no examples")
        if total == math.inf:
            raise DataError(
                "the weights of all batches must have a finite sum, got inf; make them smaller"
            )
        return {f"test_{name}": mean for name, mean in means.items()}

    def _evaluated_parts(self, state: State, batches: Iterable[dict]) -> Iterator[Weighted]:
        for batch in batches:
            with self._compiling("evaluation"):
                parts = list(self.pipe.evaluate_parts(state, batch))
            yield from parts

    def check_finite(self, name: str, step: int, value: float) -> None:
        """Check that a number is finite.

        Args:
            name: The name of the number, for the message.
            step: The number of updates done, for the message.
            value: The number.

        Raises:
            DivergedError: `value` is infinite or NaN. The message has the last finite loss and a
                remedy.
        """
        self._divergence.check_loss(name, step, value)

    # --- from shapes alone -----------------------------------------------------------------------

    def device_bytes(self) -> dict[str, int]:
        """Estimate what every device holds during a step; see `pipeline.memory`.

        Returns:
            The bytes by part: "parameters", "optimizer", "gradients", "stash", "working_set" and
            "batch".
        """
        local = self.local_shapes
        return self.pipe.device_bytes(tree_bytes((local.opt_state, local.average)))

    def local_update_arguments(self) -> tuple[Updated, PyTree]:
        """Return the shapes on one device of what an update replaces, and of the gradients."""
        state, opt_state, average = self.local_shapes
        return Updated(opt_state, average, state.params), jax.eval_shape(wide, state.params)

    def abstract_arguments(self) -> StepArguments:
        """Return the shapes and shardings of the step's arguments."""
        state, micro_batched, step = self.pipe.abstract_arguments()
        arrays = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            TrainArrays(state, *jax.eval_shape(self._begin, state.params)),
            self._shardings(),
        )
        return StepArguments(arrays, micro_batched, step)

    def lower(self) -> jax.stages.Lowered:
        """Lower the whole training step from shapes, to compile or to inspect it.

        Returns:
            The lowered step, like the result of `jax.jit(...).lower`.
        """
        return self._step.lower(*self.abstract_arguments())

    def export(self) -> export.Exported:
        """Export the whole training step for TPU; this needs no TPU.

        Returns:
            The exported step, like the result of `jax.export.export`.
        """
        return export.export(self._step, platforms=["tpu"])(*self.abstract_arguments())

    # --- layer by layer, for checkpoints ---------------------------------------------------------

    def to_layers(self, current: TrainState) -> LayerTrees:
        """Copy everything that training changes, of the layers that this process saves.

        Args:
            current: The training state. It stays usable.

        Returns:
            Trees of numpy arrays: one dict for each layer, and what no layer has. They are the same
            for any number of stages.
        """
        return by_layer.split(self.pipe.stages, self.pipe.mesh, current.arrays)

    def from_layers(self, saved: LayerTrees, step: int) -> TrainState:
        """Invert `to_layers`; read the layers of this process's devices only.

        Args:
            saved: The layers, from a checkpoint or `to_layers`.
            step: Number of updates done so far.

        Returns:
            The training state, on the devices.
        """
        arrays = by_layer.join(self.pipe.stages, self.pipe.mesh, saved, self.local_shapes)
        return arrays.at_step(step)

    def layer_shapes(self) -> LayerTrees:
        """Return the shapes of what the `to_layers` of all processes copy together."""
        return by_layer.shapes(self.pipe.stages, self.local_shapes)
