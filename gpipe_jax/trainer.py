"""The training loop: pipeline step, optimizer update, evaluation. Knows nothing of config files."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax import blocks
from gpipe_jax.cost import tree_bytes
from gpipe_jax.gradients import wide
from gpipe_jax.ledger import Ledger
from gpipe_jax.mesh import STAGE
from gpipe_jax.names import by_name, from_names
from gpipe_jax.optimizer import check_elementwise, decays, map_parameters, moving_average
from gpipe_jax.pipeline import Pipeline
from gpipe_jax.state import State
from gpipe_jax.storage import Storage
from gpipe_jax.stream import DataError

PyTree = Any
Record = Callable[[dict], None]

# Steps that may be under way at once: enough to hide Python, few enough that jax 0.10's CPU
# collectives cannot deadlock and that a loss that is not finite is seen soon.
IN_FLIGHT = 8


class TrainState(NamedTuple):
    """Everything that training changes."""

    state: State
    optimizer: PyTree
    step: int
    average: PyTree = None  # moving average of the parameters, in float32, if there is one


class Layers(NamedTuple):
    """A training state by layer, in numpy: the same for any K, V, D and schedule."""

    common: Mapping[str, Any]  # what no layer has: "seed", and the optimizer's counts
    # By global id: "params", "statistics", "average" and, say, "optimizer.0.mu", each a tree.
    layers: Mapping[int, dict[str, PyTree]]


class DivergedError(RuntimeError):
    """The loss became infinite or NaN."""


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
        self._params_structure = jax.tree.structure(self._local_params())
        self.ledger, self._compiled = Ledger(), set[str]()
        self._last_loss = math.nan  # of the newest finished step; said when the next one diverges
        # Everything is updated in place and stays where it is: a result placed otherwise (on a mesh
        # of one device) would compile the second step anew.
        places = (*self._shardings(), None)
        self._step = jax.jit(self._update, donate_argnums=(0, 1, 2), out_shardings=places)

    def init(self, seed: int = 0) -> TrainState:
        """Fresh parameters and optimizer state."""
        return self.start(self.pipe.init(seed))

    def start(self, state: State, step: int = 0) -> TrainState:
        """Training from these parameters, with a fresh optimizer."""
        begin = jax.jit(self._begin, out_shardings=self._shardings()[1:])
        optimizer, average = begin(state.params)
        return TrainState(state, optimizer, step, average)

    def _begin(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Optimizer state and average, of the gradients' type: float32 at least."""
        params = wide(params)
        return self.tx.init(params), None if self.ema is None else params

    def _local_params(self) -> list:
        return [storage.local_shapes() for storage in self.pipe.stages.params]

    def _shardings(self) -> tuple[State, PyTree, PyTree]:
        """Of state, optimizer and average: what is like the parameters lies where they do."""
        stage = NamedSharding(self.pipe.mesh, P(STAGE))
        everywhere: Any = NamedSharding(self.pipe.mesh, P())
        params = self._local_params()
        shapes = jax.eval_shape(self._begin, params)
        placed = map_parameters(lambda node: jax.tree.map(lambda _: stage, node), shapes, params)
        leaf = lambda s: s if isinstance(s, NamedSharding) else everywhere  # noqa: E731
        is_place = lambda s: isinstance(s, NamedSharding)  # noqa: E731
        return self.pipe.state_shardings(), *jax.tree.map(leaf, placed, is_leaf=is_place)

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
        slots = jax.eval_shape(self._begin, self._local_params())
        return self.pipe.device_bytes(tree_bytes(slots))

    def local_update_arguments(self) -> tuple:
        """The shapes on one device of optimizer, average, parameters and gradients."""
        params = self._local_params()
        return *jax.eval_shape(self._begin, params), params, jax.eval_shape(wide, params)

    def abstract_arguments(self) -> tuple:
        """The shapes and places of the training step's arguments; the first three are updated."""
        state, parts, step = self.pipe.abstract_arguments()
        optimizer, average = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            jax.eval_shape(self._begin, state.params),
            self._shardings()[1:],
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
                current.state, current.optimizer, current.average, parts, np.uint32(current.step)
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

    def to_layers(self, current: TrainState) -> Layers:
        """Copies of everything that training changes, of the layers that this process saves."""
        pipe = self.pipe
        trees, common = self._named(current.state, current.optimizer, current.average)
        blocks.start_copies(trees)
        layers: dict[int, dict[str, PyTree]] = {}
        for k in blocks.owned(pipe.mesh):
            for name, tree in trees.items():
                block = blocks.take(pipe.mesh, tree, k)
                for i, one in pipe.stages.split_block(self._storages(name), k, block).items():
                    layers.setdefault(i, {})[name] = one
        return Layers({name: np.array(value) for name, value in common.items()}, layers)

    def from_layers(self, saved: Layers, step: int) -> TrainState:
        """The inverse of `to_layers`; asks for the layers of this process's devices only."""
        pipe = self.pipe
        shapes = self._local_shapes()
        trees, common = self._named(*shapes)

        def block(k: int) -> dict[str, PyTree]:
            layers = {i: saved.layers[i] for i in pipe.stages.layers_of(k)}
            made = {
                name: pipe.stages.join_block(
                    self._storages(name), k, lambda i, name=name: layers[i][name]
                )
                for name in trees
            }
            # Where a stage has nothing of a parameter's type, the optimizer's may be another.
            return jax.tree.map(lambda a, s: a.astype(s.dtype, copy=False), made, trees)

        placed = blocks.place(pipe.mesh, block)
        placed |= {name: blocks.replicate(pipe.mesh, saved.common[name]) for name in common}
        parts = {"optimizer": shapes[1], "average": shapes[2]}
        rest = from_names(parts, placed, self._is_like_parameters)
        state = State(placed["params"], placed["statistics"], placed["seed"])
        return TrainState(state, rest["optimizer"], step, rest["average"])

    def layer_shapes(self) -> Layers:
        """What all processes' `to_layers` come to, as shapes."""
        trees, common = self._named(*self._local_shapes())
        layers = {}
        for i, shape in enumerate(self.pipe.shapes):
            slots = jax.eval_shape(wide, shape.params)
            own = {"params": shape.params, "statistics": shape.stats}
            layers[i] = {name: own.get(name, slots) for name in trees}
        return Layers(common, layers)

    def _local_shapes(self) -> tuple[State, PyTree, PyTree]:
        """One device's state, optimizer and average."""
        params = self._local_params()
        stats = [storage.local_shapes() for storage in self.pipe.stages.stats]
        seed: Any = jax.ShapeDtypeStruct((), jnp.uint32)
        return State(params, stats, seed), *jax.eval_shape(self._begin, params)

    def _named(self, state: State, optimizer: PyTree, average: PyTree) -> tuple[dict, dict]:
        """By name what is cut over the devices, and what they all have."""
        alike = self._is_like_parameters
        named = by_name({"optimizer": optimizer, "average": average}, alike)
        trees = {name: tree for name, tree in named.items() if alike(tree)}
        common = {name: value for name, value in named.items() if name not in trees}
        trees |= {"params": state.params, "statistics": state.stats}
        return trees, {**common, "seed": state.seed}

    def _is_like_parameters(self, node: PyTree) -> bool:
        return jax.tree.structure(node) == self._params_structure

    def _storages(self, name: str) -> list[Storage]:
        stages = self.pipe.stages
        return stages.stats if name == "statistics" else stages.params
