"""Train a pipeline: steps, optimizer updates and evaluation, without config files."""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax import export

from gpipe_jax.checkpoint import by_layer
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.distributed.mesh import params_sharding, replicated_sharding
from gpipe_jax.errors import DataError, DivergedError
from gpipe_jax.pipeline import memory, spmd
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.state import State, TrainState
from gpipe_jax.training.elementwise import check_elementwise
from gpipe_jax.training.optimizers import decays, map_parameters, moving_average
from gpipe_jax.training.profiling import Timings
from gpipe_jax.utils.trees import PyTree, tree_bytes, wide

Record = Callable[[dict], None]

# Steps that may be in progress at once: enough to hide Python, few enough that jax 0.10's CPU
# collectives cannot deadlock, and that a loss that is not finite is noticed soon.
IN_FLIGHT = 8


class Trainer:
    """Train a pipeline with an optimizer.

    Args:
        pipe: The pipeline.
        tx: An optax transformation that acts on each element alone, and global norms. Adafactor,
            LAMB and masks do not, so their result would depend on the number of stages.
        ema: Decay of a moving average of the parameters, in (0, 1); `evaluated` returns the average
            then. None keeps no average. Default: None.

    Raises:
        ValueError: `tx` does not act elementwise, or a device needs more than the pipeline's
            `memory_limit`.

    Example::

        trainer = gpipe.Trainer(pipe, optax.adam(1e-3), ema=0.999)
        current = trainer.init(seed=0)
        current = trainer.fit(current, batches, steps=100, record=print)
        print(trainer.evaluate(trainer.evaluated(current), held_out_batches))
    """

    def __init__(
        self, pipe: Pipeline, tx: optax.GradientTransformation, *, ema: float | None = None
    ) -> None:
        check_elementwise(tx)
        self.pipe, self.tx, self.ema = pipe, optax.with_extra_args_support(tx), ema
        if pipe.memory_limit is not None:
            memory.check(self.device_bytes(), pipe.memory_limit)
        self.timings, self._compiled = Timings(), set[str]()
        self._last_loss = math.nan  # of the newest finished step, for the message of a divergence
        # Everything is updated in place and stays where it is. A result with another sharding (on
        # a mesh of one device) would compile the second step again.
        places = self._shardings()
        outputs = (places.state, places.opt_state, places.average, None)
        self._step = jax.jit(self._update, donate_argnums=(0, 1, 2), out_shardings=outputs)

    # --- the training state ----------------------------------------------------------------------

    def init(self, seed: int = 0) -> TrainState:
        """Initialize the parameters and the optimizer.

        Args:
            seed: Seed of the parameters and of all randomness in training. Default: 0.
        """
        return self.start(self.pipe.init(seed))

    def start(self, state: State, step: int = 0) -> TrainState:
        """Initialize the optimizer for given parameters.

        The first step donates the arrays of `state`, so do not use them after it.

        Args:
            state: Parameters, running statistics and seed.
            step: Number of updates done so far. Default: 0.
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
    def local_shapes(self) -> TrainState:
        """Return the shapes of the arrays that one device holds; `step` is 0."""
        state = states.local_shapes(self.pipe.stages)
        opt_state, average = jax.eval_shape(self._begin, state.params)
        return TrainState(state, opt_state, 0, average)

    def _shardings(self) -> TrainState:
        """Return how the arrays lie on the devices; `step` is not an array.

        What has the form of the parameters lies as they do. Every device has a copy of the rest.
        """
        mesh, local = self.pipe.mesh, self.local_shapes
        sharded, replicated = params_sharding(mesh), replicated_sharding(mesh)

        def like_params(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda _: sharded, tree)

        def place(tree: PyTree) -> PyTree:
            placed = map_parameters(like_params, tree, local.state.params)
            return jax.tree.map(lambda a: sharded if a is sharded else replicated, placed)

        state = states.shardings(self.pipe.stages, mesh)
        return TrainState(state, place(local.opt_state), 0, place(local.average))

    def evaluated(self, current: TrainState) -> State:
        """Return the state to evaluate: with the moving average of the parameters, if there is one.

        Running statistics of batch norms are moving averages already, so they stay as they are.
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
            state, opt_state, average, metrics = self._step(
                current.state,
                current.opt_state,
                current.average,
                micro_batched,
                np.uint32(current.step),
            )
        return TrainState(state, opt_state, current.step + 1, average), metrics

    def _update(
        self,
        state: State,
        opt_state: PyTree,
        average: PyTree,
        micro_batched: dict,
        step: jax.Array,
    ) -> tuple[State, PyTree, PyTree, dict[str, jax.Array]]:
        """Compute the whole training step, traced."""
        (loss, metrics), grads, stats = self.pipe.gradients(state, micro_batched, step)
        decaying = spmd.mask_parameters(self.pipe.stages, self.pipe.mesh, decays)
        opt_state, average, params = self.apply_gradients(
            opt_state, average, state.params, grads, step, decaying
        )
        state = state._replace(params=params, stats=stats)
        return state, opt_state, average, {"loss": loss, **metrics}

    def apply_gradients(
        self,
        opt_state: PyTree,
        average: PyTree,
        params: PyTree,
        grads: PyTree,
        step: jax.Array,
        decaying: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return optimizer state, average and parameters after an update, traced.

        Args:
            opt_state: The optimizer's state.
            average: The moving average of the parameters, or None.
            params: The parameters.
            grads: The gradients, in the form of the parameters.
            step: Number of updates done so far.
            decaying: Which parameters decay, in the form of the parameters.
        """
        updates, opt_state = self.tx.update(grads, opt_state, params, decaying=decaying)
        params = optax.apply_updates(params, updates)
        if self.ema is not None:
            average = moving_average(average, params, step, self.ema)
        return opt_state, average, params

    def _compiling(self, program: str) -> contextlib.AbstractContextManager:
        """Count the first call of a program as compilation."""
        first = program not in self._compiled
        self._compiled.add(program)
        return self.timings.spend("compile") if first else contextlib.nullcontext()

    # --- many steps ------------------------------------------------------------------------------

    def fit(
        self,
        current: TrainState,
        batches: Iterator[dict],
        steps: int,
        record: Record,
        stopped: Callable[[int], bool] = lambda step: False,
    ) -> TrainState:
        """Train until `steps` updates are done, earlier ones included.

        Args:
            current: The training state. It is donated, so do not use it again.
            batches: Iterator over batches like the pipeline's example.
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
            DivergedError: a loss is not finite.
            ValueError: `batches` is exhausted too early.
        """
        in_flight: deque[tuple[int, dict, float]] = deque()
        clock = time.perf_counter()

        def finish() -> None:
            nonlocal clock
            step, metrics, start_s = in_flight.popleft()
            values = {name: float(value) for name, value in metrics.items()}
            self.check_finite("loss", step, values["loss"])
            self._last_loss, now = values["loss"], time.perf_counter()
            record({"step": step, **values, "step_time_s": max(now - clock, start_s)})
            clock = now

        while current.step < steps and not stopped(current.step):
            begun = time.perf_counter()
            with self.timings.spend("data"):
                batch = next(batches, None)
            if batch is None:
                raise ValueError(f"`batches` ended after {current.step} of {steps} steps")
            current, metrics = self.step(current, batch)
            in_flight.append((current.step, metrics, time.perf_counter() - begun))
            if len(in_flight) >= IN_FLIGHT:
                finish()
        while in_flight:
            finish()
        return current

    def evaluate(self, state: State, batches: Iterator[dict]) -> dict[str, float]:
        """Compute loss and metrics over all of `batches`.

        Args:
            state: The state to evaluate; see `evaluated`.
            batches: Iterator over batches like the pipeline's example, or shorter.

        Returns:
            Weighted means over the examples, as "test_loss" and so on.

        Raises:
            DataError: there are no examples.
        """
        sums: dict[str, float] = {}
        total = 0.0
        for batch in batches:
            count = jax.tree.leaves(batch["inputs"])[0].shape[0]
            weight = float(np.sum(batch.get("weights", count)))
            with self._compiling("evaluation"):
                loss, metrics = self.pipe.evaluate(state, batch)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + weight * float(value)
            total += weight
        if not total:
            raise DataError("there is nothing to evaluate: the held-out data has no examples")
        return {f"test_{name}": value / total for name, value in sums.items()}

    def check_finite(self, name: str, step: int, value: float) -> None:
        """Raise DivergedError, with the last finite loss and a remedy, if `value` is not finite."""
        if math.isfinite(value):
            return
        last = f"the last finite loss was {self._last_loss:.6g}"
        if math.isnan(self._last_loss):
            last = "there was no step before it"
        raise DivergedError(
            f"the {name} became {value} at step {step} ({last}); "
            f"try a lower optimizer.learning_rate, more optimizer.warmup_steps, or "
            f"optimizer.clip_norm=1; a label that is none of the network's classes makes it NaN too"
        )

    # --- from shapes alone -----------------------------------------------------------------------

    def device_bytes(self) -> dict[str, int]:
        """Estimate what every device holds during a step, in bytes by part; see `memory`."""
        local = self.local_shapes
        return self.pipe.device_bytes(tree_bytes((local.opt_state, local.average)))

    def local_update_arguments(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Return the shapes on one device of optimizer state, average, parameters and gradients."""
        local = self.local_shapes
        params = local.state.params
        return local.opt_state, local.average, params, jax.eval_shape(wide, params)

    def abstract_arguments(self) -> tuple[State, PyTree, PyTree, dict, Any]:
        """Return shapes and shardings of the step's arguments; the first three are updated."""
        state, micro_batched, step = self.pipe.abstract_arguments()
        places = self._shardings()
        opt_state, average = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            jax.eval_shape(self._begin, state.params),
            (places.opt_state, places.average),
        )
        return state, opt_state, average, micro_batched, step

    def lower(self) -> jax.stages.Lowered:
        """Lower the whole training step from shapes, to compile or to inspect it."""
        return self._step.lower(*self.abstract_arguments())

    def export(self) -> export.Exported:
        """Export the whole training step for TPU; this needs no TPU."""
        return export.export(self._step, platforms=["tpu"])(*self.abstract_arguments())

    # --- layer by layer, for checkpoints ---------------------------------------------------------

    def to_layers(self, current: TrainState) -> LayerTrees:
        """Copy everything that training changes, of the layers that this process saves."""
        return by_layer.split(self.pipe.stages, self.pipe.mesh, current)

    def from_layers(self, saved: LayerTrees, step: int) -> TrainState:
        """Invert `to_layers`; read the layers of this process's devices only.

        Args:
            saved: The layers, from a checkpoint or `to_layers`.
            step: Number of updates done so far.
        """
        local = self.local_shapes._replace(step=step)
        return by_layer.join(self.pipe.stages, self.pipe.mesh, saved, local)

    def layer_shapes(self) -> LayerTrees:
        """Return the shapes of what the `to_layers` of all processes copy together."""
        return by_layer.shapes(self.pipe.stages, self.local_shapes)
