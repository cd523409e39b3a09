"""Train a pipeline: steps, optimizer updates and evaluation, without config files."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import optax
from jax import export

from gpipe_jax import progress as progress_of
from gpipe_jax.checkpoint import by_layer
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.distributed import processes
from gpipe_jax.errors import DataError, DivergedError
from gpipe_jax.pipeline import memory
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.results import Weighted, weighted_mean
from gpipe_jax.pipeline.state import State, TrainState, is_given_up
from gpipe_jax.training import saving
from gpipe_jax.training.fitting import fit as fitting
from gpipe_jax.training.fitting.callbacks import Callback
from gpipe_jax.training.fitting.divergence import Divergence
from gpipe_jax.training.fitting.fit import HeldOut
from gpipe_jax.training.fitting.steps_in_flight import Record
from gpipe_jax.training.fitting.train_step import TrainStep
from gpipe_jax.training.profiling import Timings
from gpipe_jax.utils.checks import check_fraction
from gpipe_jax.utils.paths import AnyPath
from gpipe_jax.utils.trees import tree_bytes


def never(step: int) -> bool:
    """Return False: do not stop before this step."""
    return False


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
        divergence: The check that losses and states are finite.
        train_step: The compiled step, and the shapes of its arrays.

    Raises:
        ArgumentError: `tx` is no optax transformation, or `ema` is not in (0, 1).
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
        if ema is not None:
            check_fraction("ema", ema, zero=False)
        self.pipe, self.ema = pipe, ema
        self.train_step = TrainStep(pipe, tx, ema)
        self.tx = self.train_step.tx
        if pipe.memory_limit is not None:
            memory.check(self.device_bytes(), pipe.memory_limit)
        self.timings, self._compiled = Timings(), set[str]()
        self.reached: TrainState | None = None
        self.divergence = Divergence(pipe.mesh)

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
        self.pipe.check_state(state)
        opt_state, average = self.train_step.begin(state.params)
        return TrainState(state, opt_state, step, average)

    def evaluated(self, current: TrainState) -> State:
        """Return the state to evaluate: with the moving average of the parameters, if there is one.

        Running statistics of batch norms are moving averages already, so they stay as they are.

        Args:
            current: The training state. It stays usable.

        Returns:
            The state for `evaluate`. Without `ema` it is `current.state`.
        """
        self.train_step.check(current)
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
        self.train_step.check(current)
        micro_batched = self.pipe.split(batch, train=True)
        with self._compiling("step"):
            arrays, metrics = self.train_step.run(current.arrays, micro_batched, current.step)
        return arrays.at_step(current.step + 1), metrics

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
        steps: int | None = None,
        record: Record | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        evaluate: HeldOut | None = None,
        every: int | None = None,
        progress: bool = False,
        stopped: Callable[[int], bool] = never,
    ) -> TrainState:
        """Train until `steps` updates are done, earlier ones included.

        To continue later, give more `steps`. After an error other than DivergedError, and after
        Ctrl-C, `reached` is the state of the completed steps: `current = trainer.reached`.

        A step's record has "step" (from 1), "loss", the metrics of the loss function and
        "step_time_s". This is the time since the last step finished, or the time to start the step
        if that is longer (devices faster than the host). Up to 8 steps are in progress at once, so
        a callback that stops at a step's record stops up to 7 steps later. An evaluation's record
        has "step", "test_loss" and so on, as `evaluate` returns them. All steps have finished
        before it, so a callback stops exactly there.

        Args:
            current: The training state. It is donated, so do not use it again.
            batches: Batches like the pipeline's example, from the next step on: a list, an iterator
                or another iterable.
            steps: Number of updates in all at the end. Default: None, until `batches` ends; then
                it must end, or a callback must stop.
            record: Function that gets each record, in order. Default: None.
            callbacks: Functions that get each record, as `record` does. Training stops when one
                returns true. An `EarlyStopping` starts afresh. Default: none.
            evaluate: Held-out batches as a list, or a function that returns an iterator of them.
                Evaluations use the moving average, if there is one. Default: no evaluation.
            every: Steps between evaluations. There is always one at the end. Default: that only.
            progress: Whether to show a bar on a terminal, and lines elsewhere. Default: False.
            stopped: Function (updates done) -> whether to stop before the next step. Default: never
                stop.

        Returns:
            The training state after the last step.

        Raises:
            DivergedError: A loss, or the state after the last step, is not finite.
            DataError: `batches` ends before `steps`, or a batch does not look like the example.
            ArgumentError: An argument cannot be used.
        """
        self.train_step.check(current)
        fitting.check_steps(steps, current.step)
        fitting.note_other_length(steps, self.pipe.steps)
        batches = fitting.iterator_of("batches", batches)
        self.reached = None
        with self._showing(progress, steps) as show:
            records = [shown for shown in (record, show) if shown is not None]
            wanted = fitting.Wanted(steps, records, callbacks, evaluate, every, stopped)
            fit = fitting.Fit(self, current, wanted)
            try:
                return fit.run(batches)
            except DivergedError:
                raise
            except BaseException as error:
                if not is_given_up(fit.current.arrays):
                    self.reached = fit.current
                    error.add_note(
                        f"(the state after step {fit.current.step} is kept; in Python: "
                        f"`trainer.reached`)"
                    )
                raise

    @contextlib.contextmanager
    def _showing(self, progress: bool, steps: int | None) -> Iterator[Record | None]:
        """Yield a function that shows each record; None if nothing is to be shown."""
        if not progress or not processes.is_first():
            yield None
            return
        with progress_of.show(steps, every=max(1, (steps or 1000) // 10)) as show:
            yield show

    def is_finite(self, current: TrainState) -> bool:
        """Check that neither NaN nor infinity is in what training changes.

        Several processes get the same answer, and must call this together.

        Args:
            current: The training state. It stays usable.

        Returns:
            Whether parameters, running statistics, their averages and the optimizer's moments are
            finite.
        """
        if self.divergence.is_finite(current.arrays):
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
        self.pipe.check_state(state)
        if isinstance(batches, Mapping):
            raise DataError("`batches` is a dict; give a list of batches: [batch]")
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

    # --- from shapes alone -----------------------------------------------------------------------

    def device_bytes(self) -> dict[str, int]:
        """Estimate what every device holds during a step; see `pipeline.memory`.

        Returns:
            The bytes by part: "parameters", "optimizer", "gradients", "stash", "working_set" and
            "batch".
        """
        local = self.train_step.local_shapes
        return self.pipe.device_bytes(tree_bytes((local.opt_state, local.average)))

    def lower(self) -> jax.stages.Lowered:
        """Lower the whole training step from shapes, to compile or to inspect it.

        Returns:
            The lowered step, like the result of `jax.jit(...).lower`.
        """
        return self.train_step.program.lower(*self.train_step.abstract_arguments())

    def export(self) -> export.Exported:
        """Export the whole training step for TPU; this needs no TPU.

        Returns:
            The exported step, like the result of `jax.export.export`.
        """
        exported = export.export(self.train_step.program, platforms=["tpu"])
        return exported(*self.train_step.abstract_arguments())

    # --- checkpoints -----------------------------------------------------------------------------

    def save(self, path: AnyPath, current: TrainState) -> None:
        """Write a checkpoint of everything that training changes, for any layout.

        The checkpoint gets its name when it is complete. Those of earlier steps stay; one of the
        same step is replaced. Several processes must call this together.

        Args:
            path: A folder for the checkpoints of this training, also gs://. `gpipe export` and
                `train.init_from` read it too.
            current: The training state. It stays usable.

        Raises:
            ArgumentError: The folder belongs to a run of `gpipe train`, or has a checkpoint of a
                later step; or the state is not finite.
            SaveError: The checkpoint could not be written. Earlier ones are intact.
        """
        self.train_step.check(current)
        saving.save(self, path, current)

    def load(self, path: AnyPath) -> TrainState:
        """Load the newest intact checkpoint of `save` or of a run, of any layout.

        The network and the form of the optimizer must be the same; `gpipe.warm_start` takes what
        fits. Mesh, schedule, chunks and micro-batches may differ. A message names newer checkpoints
        that are damaged.

        Args:
            path: A folder that `save` has written, the folder of a run, or one checkpoint there:
                `runs/digits/checkpoints/300`.

        Returns:
            The training state, on the devices.

        Raises:
            ArgumentError: There is no checkpoint, none is intact, or it does not fit.
            UnreadableCheckpointError: No checkpoint can be read now.
        """
        return saving.load(self, path)

    # --- layer by layer, for checkpoints ---------------------------------------------------------

    def to_layers(self, current: TrainState) -> LayerTrees:
        """Copy everything that training changes, of the layers that this process saves.

        Args:
            current: The training state. It stays usable.

        Returns:
            Trees of numpy arrays: one dict for each layer, and what no layer has. They are the same
            for any number of stages.
        """
        self.train_step.check(current)
        return by_layer.split(self.pipe.stages, self.pipe.mesh, current.arrays)

    def from_layers(self, saved: LayerTrees, step: int) -> TrainState:
        """Invert `to_layers`; read the layers of this process's devices only.

        Args:
            saved: The layers, from a checkpoint or `to_layers`.
            step: Number of updates done so far.

        Returns:
            The training state, on the devices.
        """
        shapes = self.train_step.local_shapes
        return by_layer.join(self.pipe.stages, self.pipe.mesh, saved, shapes).at_step(step)

    def layer_shapes(self) -> LayerTrees:
        """Return the shapes of what the `to_layers` of all processes copy together."""
        return by_layer.shapes(self.pipe.stages, self.train_step.local_shapes)
