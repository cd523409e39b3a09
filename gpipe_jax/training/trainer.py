"""The training loop: pipeline step, optimizer update, evaluation. Knows nothing of config files."""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
from jax import export

from gpipe_jax.checkpoint import by_layer
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.distributed.mesh import params_sharding, replicated_sharding
from gpipe_jax.errors import DataError, DivergedError
from gpipe_jax.pipeline import memory
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.state import State, TrainState
from gpipe_jax.training.elementwise import check_elementwise
from gpipe_jax.training.optimizers import decays, map_parameters, moving_average
from gpipe_jax.training.profiling import Timings
from gpipe_jax.utils.trees import PyTree, tree_bytes, wide

Record = Callable[[dict], None]

# Steps that may be under way at once: enough to hide Python, few enough that jax 0.10's CPU
# collectives cannot deadlock and that a loss that is not finite is seen soon.
IN_FLIGHT = 8


class Trainer:
    """A pipeline with an optimizer.

    `tx` is an optax transformation that acts elementwise (checked; see `optimizer`). `ema` is the
    decay of a moving average of the parameters, which is then what `evaluated` returns.
    """

    def __init__(
        self, pipe: Pipeline, tx: optax.GradientTransformation, *, ema: float | None = None
    ) -> None:
        check_elementwise(tx)
        self.pipe, self.tx, self.ema = pipe, optax.with_extra_args_support(tx), ema
        if pipe.memory_limit is not None:
            memory.check(self.device_bytes(), pipe.memory_limit)
        self.ledger, self._compiled = Timings(), set[str]()
        self._last_loss = math.nan  # of the newest finished step; said when the next one diverges
        # Everything is updated in place and stays where it is: a result placed otherwise (on a mesh
        # of one device) would compile the second step anew.
        places = self._shardings()
        outputs = (places.state, places.opt_state, places.average, None)
        self._step = jax.jit(self._update, donate_argnums=(0, 1, 2), out_shardings=outputs)

    def init(self, seed: int = 0) -> TrainState:
        """Fresh parameters and optimizer state."""
        return self.start(self.pipe.init(seed))

    def start(self, state: State, step: int = 0) -> TrainState:
        """Training from these parameters, with a fresh optimizer.

        The first step takes the arrays of `state` for its results: they are gone then.
        """
        places = self._shardings()
        begin = jax.jit(self._begin, out_shardings=(places.opt_state, places.average))
        opt_state, average = begin(state.params)
        return TrainState(state, opt_state, step, average)

    def _begin(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Optimizer state and average, of the gradients' type: float32 at least."""
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

    def _update(
        self, state: State, optimizer: PyTree, average: PyTree, parts: dict, step: jax.Array
    ) -> tuple:
        (loss, metrics), grads, stats = self.pipe.gradients(state, parts, step)
        optimizer, average, params = self.apply_gradients(
            optimizer, average, state.params, grads, step, self._decaying()
        )
        state = state._replace(params=params, stats=stats)
        return state, optimizer, average, {"loss": loss, **metrics}

    def apply_gradients(
        self,
        optimizer: PyTree,
        average: PyTree,
        params: PyTree,
        grads: PyTree,
        step: jax.Array,
        decaying: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Traced: optimizer, average and parameters after the update."""
        updates, optimizer = self.tx.update(grads, optimizer, params, decaying=decaying)
        params = optax.apply_updates(params, updates)
        if self.ema is not None:
            average = moving_average(average, params, step, self.ema)
        return optimizer, average, params

    def evaluated(self, current: TrainState) -> State:
        """What is evaluated: the moving average of the parameters, if there is one.

        Running statistics of batch norms are moving averages already and are taken as they are.
        """
        if self.ema is None:
            return current.state
        params = jax.tree.map(lambda a, p: a.astype(p.dtype), current.average, current.state.params)
        return current.state._replace(params=params)

    def device_bytes(self) -> dict[str, int]:
        """What every device holds, by part, estimated from shapes: bytes. See `memory`."""
        local = self.local_shapes
        return self.pipe.device_bytes(tree_bytes((local.opt_state, local.average)))

    def local_update_arguments(self) -> tuple:
        """The shapes on one device of optimizer, average, parameters and gradients."""
        local = self.local_shapes
        params = local.state.params
        return local.opt_state, local.average, params, jax.eval_shape(wide, params)

    def abstract_arguments(self) -> tuple:
        """The shapes and places of the training step's arguments; the first three are updated."""
        places = self._shardings()
        state, parts, step = self.pipe.abstract_arguments()
        optimizer, average = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            jax.eval_shape(self._begin, state.params),
            (places.opt_state, places.average),
        )
        return state, optimizer, average, parts, step

    def lower(self) -> jax.stages.Lowered:
        """The whole training step lowered from shapes, to compile and to measure."""
        return self._step.lower(*self.abstract_arguments())

    def export(self) -> export.Exported:
        """The whole training step for TPUs, which need not be there."""
        return export.export(self._step, platforms=["tpu"])(*self.abstract_arguments())

    def _decaying(self) -> PyTree:
        return self.pipe.mask_parameters(decays)

    def step(self, current: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """One update; `current` must not be used again. Metrics are arrays not yet waited for."""
        parts = self.pipe.training_split(batch)
        with self._compiling("step"):
            state, optimizer, average, metrics = self._step(
                current.state, current.opt_state, current.average, parts, np.uint32(current.step)
            )
        return TrainState(state, optimizer, current.step + 1, average), metrics

    def _compiling(self, program: str) -> contextlib.AbstractContextManager:
        """Books the first call of a program on compiling."""
        first = program not in self._compiled
        self._compiled.add(program)
        return self.ledger.spend("compile") if first else contextlib.nullcontext()

    def fit(
        self,
        current: TrainState,
        batches: Iterator[dict],
        steps: int,
        record: Record,
        stopped: Callable[[int], bool] = lambda step: False,
    ) -> TrainState:
        """Train until `steps` steps are done in all; `record` gets each step's metrics in order.

        Before each step `stopped(steps done)` may end it early.

        A record has "step" (from 1), "loss", the loss function's metrics and "step_time_s", the
        time since the step before was done, or what it took to start the step, if that is longer
        (devices faster than the host). Raises DivergedError when a loss is not finite.
        """
        under_way: deque[tuple[int, dict, float]] = deque()
        clock = time.perf_counter()

        def finish() -> None:
            nonlocal clock
            step, metrics, start_s = under_way.popleft()
            values = {name: float(value) for name, value in metrics.items()}
            self.check_finite("loss", step, values["loss"])
            self._last_loss, now = values["loss"], time.perf_counter()
            record({"step": step, **values, "step_time_s": max(now - clock, start_s)})
            clock = now

        while current.step < steps and not stopped(current.step):
            begun = time.perf_counter()
            with self.ledger.spend("data"):
                batch = next(batches, None)
            if batch is None:
                raise ValueError(f"`batches` ended after {current.step} of {steps} steps")
            current, metrics = self.step(current, batch)
            under_way.append((current.step, metrics, time.perf_counter() - begun))
            if len(under_way) >= IN_FLIGHT:
                finish()
        while under_way:
            finish()
        return current

    def evaluate(self, state: State, batches: Iterator[dict]) -> dict[str, float]:
        """Weighted means of loss and metrics over all of `batches`, as "test_loss" and so on."""
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
        """Raise DivergedError, with the last good loss and a remedy, if `value` is not finite."""
        if math.isfinite(value):
            return
        last = f"the last finite loss was {self._last_loss:.6g}"
        raise DivergedError(
            f"the {name} became {value} at step {step} "
            f"({'there was no step before it' if math.isnan(self._last_loss) else last}); "
            f"try a lower optimizer.learning_rate, more optimizer.warmup_steps, or "
            f"optimizer.clip_norm=1; a label that is none of the network's classes makes it NaN too"
        )

    # --- layer by layer, for checkpoints ----------------------------------------------------------

    def to_layers(self, current: TrainState) -> LayerTrees:
        """Copies of everything that training changes, of the layers that this process saves."""
        return by_layer.split(self.pipe.stages, self.pipe.mesh, current)

    def from_layers(self, saved: LayerTrees, step: int) -> TrainState:
        """The inverse of `to_layers`; asks for the layers of this process's devices only."""
        local = self.local_shapes._replace(step=step)
        return by_layer.join(self.pipe.stages, self.pipe.mesh, saved, local)

    def layer_shapes(self) -> LayerTrees:
        """What all processes' `to_layers` come to, as shapes."""
        return by_layer.shapes(self.pipe.stages, self.local_shapes)
