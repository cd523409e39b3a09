"""Do many steps of a trainer, evaluate when it is due, and stop when a callback says so."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpipe_jax.data.stream import Dataset
from gpipe_jax.distributed import processes
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.training.fitting import callbacks
from gpipe_jax.training.fitting.callbacks import Callback
from gpipe_jax.training.fitting.steps_in_flight import Record, StepsInFlight
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.messages import say

if TYPE_CHECKING:
    from gpipe_jax.training.trainer import Trainer

_END: Any = object()  # what comes after the last batch
HeldOut = Iterable[dict] | Callable[[], Iterable[dict]]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Hold the arguments of `Trainer.fit`, checked.

    Attributes:
        steps: Number of updates at the end; None for as many as there are batches.
        records: Functions that get each record.
        callbacks: Functions that get each record, and may stop the training.
        evaluate: Held-out batches; None for no evaluation.
        every: Steps between evaluations; None for one evaluation at the end.
        stopped: Function (updates done) -> whether to stop before the next step.
    """

    steps: int | None
    records: Sequence[Record]
    callbacks: Sequence[Callback]
    evaluate: HeldOut | None
    every: int | None
    stopped: Callable[[int], bool]

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count("steps", self.steps)
        _check_functions(self.callbacks)
        _check_evaluation(self.evaluate, self.every)
        for stop in callbacks.early_stopping(self.callbacks):
            if self.evaluate is None:
                raise ArgumentError(
                    "callbacks",
                    f"EarlyStopping looks at {stop.metric!r} of an evaluation, and `evaluate` is "
                    f"None; give held-out batches: evaluate=data.test, every=100",
                )


def _check_functions(given: Any) -> None:
    if callable(given) or not isinstance(given, Sequence):
        message = f"`callbacks` must be a list of functions, got {given!r}; put it into a list"
        raise ArgumentError("callbacks", message)
    for function in given:
        if isinstance(function, type):
            name = function.__name__
            raise ArgumentError(
                "callbacks", f"`callbacks` has the class {name}; make an instance: {name}(...)"
            )
        if not callable(function):
            raise ArgumentError(
                "callbacks",
                f"`callbacks` has {function!r}, which cannot be called; give functions of a record",
            )


def _check_evaluation(held_out: Any, every: int | None) -> None:
    if every is not None:
        check_count("every", every)
        if held_out is None:
            raise ArgumentError(
                "every",
                f"`every` {every} is the number of steps between evaluations, and `evaluate` is "
                f"None; give held-out batches, or remove `every`",
            )
    if isinstance(held_out, Iterator):
        raise ArgumentError(
            "evaluate",
            "`evaluate` is an iterator, which one evaluation uses up; give a list, or a function "
            "that returns an iterator, such as data.test",
        )
    if held_out is not None and not callable(held_out):
        iterator_of("evaluate", held_out)


def iterator_of(argument: str, batches: Any) -> Iterator[dict]:
    """Return an iterator over batches; raise ArgumentError for what has none."""
    if isinstance(batches, Dataset):
        problem = (
            f"is a data set; give {'data.test' if argument == 'evaluate' else 'data.train(0)'}"
        )
    elif isinstance(batches, Mapping):
        problem = f"is one batch, with {list(batches)}; put it into a list"
    elif not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        problem = f"must be a list or an iterator of batches, got {batches!r}"
        problem += "; call it, as data.train(0)" if callable(batches) else ""
    else:
        return iter(batches)
    raise ArgumentError(argument, f"`{argument}` {problem}")


def check_steps(steps: int | None, done: int) -> None:
    """Raise ArgumentError if a state has done more updates than are asked for."""
    if steps is not None and steps < done:
        raise ArgumentError(
            "steps",
            f"`steps` {steps} is the number of updates in all, and `current` has done "
            f"{done}; give at least {done + 1}",
        )


def note_other_length(steps: int | None, length: int | None) -> None:
    """Say that a training goes beyond the length that the pipeline's layers know."""
    if steps is not None and length is not None and steps > length and processes.is_first():
        say(
            f"`steps` {steps} is more than the pipeline's `steps` {length}: layers that read "
            f"`progress`, as drop-path does, stay as at step {length}; for another length, give "
            f"Pipeline(steps={steps})"
        )


class Fit:
    """Train with one call of `Trainer.fit`.

    Attributes:
        current: The state after the last step that was started.
    """

    def __init__(self, trainer: "Trainer", current: TrainState, wanted: Wanted) -> None:
        self.current, self._trainer, self._wanted = current, trainer, wanted
        self._in_flight = StepsInFlight(trainer.divergence, self._record)
        self._checked = self._evaluated = self._start = current.step
        self._ended = False  # whether a callback has stopped the training
        for stop in callbacks.early_stopping(wanted.callbacks):
            stop.reset()

    def run(self, batches: Iterator[dict]) -> TrainState:
        """Do all steps; return the state after the last one."""
        while not self._is_over():
            with self._in_flight.finished_before_errors():
                begun = time.perf_counter()
                batch = self._next(batches)
                if batch is None:
                    break
                self.current, metrics = self._trainer.step(self.current, batch)
            self._in_flight.add(self.current.step, metrics, time.perf_counter() - begun)
            every = self._wanted.every
            if every is not None and self.current.step % every == 0:
                self._evaluate()
        self._evaluate()
        return self.current

    def _is_over(self) -> bool:
        step, steps = self.current.step, self._wanted.steps
        return self._ended or step == steps or self._wanted.stopped(step)

    def _next(self, batches: Iterator[dict]) -> dict | None:
        """Return the next batch; None at the end of the batches, if that ends the training."""
        with self._trainer.timings.spend("data"):
            batch = next(batches, _END)
        step, steps = self.current.step, self._wanted.steps
        if batch is None:
            raise DataError(
                f"`batches` has None in place of a batch, after step {step}; give a batch, or let "
                f"the iterator end"
            )
        if batch is not _END:
            return batch
        if steps is not None:
            raise DataError(
                f"`batches` ended after {step} of {steps} steps; give an iterator without end, or "
                f"ask for {step} steps"
            )
        if step == self._start:
            raise DataError("`batches` has no batch; give a list, or an iterator that is not ended")
        return None

    def _evaluate(self) -> None:
        """Finish and check the steps so far, and evaluate them, unless this is done already."""
        self._in_flight.finish_all()
        step, held_out = self.current.step, self._wanted.evaluate
        if step > self._checked:
            self._check_state()
        if held_out is None or step == self._evaluated:
            return
        batches = held_out() if callable(held_out) else held_out
        with self._trainer.timings.spend("evaluation"):
            state = self._trainer.evaluated(self.current)
            figures = self._trainer.evaluate(state, iterator_of("evaluate", batches))
        self._trainer.divergence.check_loss("held-out loss", step, figures["test_loss"])
        self._evaluated = step
        self._record({"step": step, **figures})
        self._in_flight.restart_clock()

    def _check_state(self) -> None:
        """Raise DivergedError unless the state is finite, as a loss does not show its own step."""
        trainer, step = self._trainer, self.current.step
        if not trainer.is_finite(self.current):
            raise trainer.divergence.error(self._checked, step, trainer.to_layers(self.current))
        self._checked = step

    def _record(self, record: dict) -> None:
        for show in self._wanted.records:
            show(record)
        self._ended = callbacks.call(self._wanted.callbacks, record) or self._ended
