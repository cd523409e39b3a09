"""What tells how good an architecture is, and all that can come of asking.

An evaluator is a function of an architecture that returns its fitness, or a dict with `fitness` and
any other numbers to record; or an object with a method `evaluate(job)` that returns the same, which
sees the whole `Job`.
"""

import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple, Protocol

FAILURES = ("exception", "timeout", "nan", "out_of_memory", "worker_death")
TRAINED_VALUES = "trained_values"


@dataclass(frozen=True)
class Job:
    """One attempt to train one candidate: what `Search.ask` hands out and workers are sent."""

    evaluation: int
    candidate: int
    architecture: Any
    seed: int
    """For all of the evaluator's chance: the same in every attempt, so that results repeat."""
    attempt: int = 1
    tournament: int | None = None
    """Of a member that is trained again: the candidate of which it may become the parent."""
    inherit: str | None = None
    """Where there are trained values to start from: what an evaluation returned by the name
    `trained_values`. With `retrain_warm` a re-trained member's own, and a child's parent's."""
    rivals: tuple[float, ...] = ()
    """What the population's members had, when the candidate was proposed, by the metric that the
    search compares by, if it does."""


def seed(search: int, candidate: int, tournament: int | None = None) -> int:
    """Of a job, from the search's own: a number of 31 bits."""
    return Random(f"{search} {candidate} {tournament} evaluation").getrandbits(31)


class Outcome(NamedTuple):
    """What came of a job. `kind` is `ok`, or one of `FAILURES`."""

    kind: str
    fitness: float | None = None
    metrics: Mapping[str, float] = {}
    trained_values: str | None = None
    error: str | None = None
    worker: str | None = None
    started: float | None = None  # seconds since 1970
    finished: float | None = None


class Evaluator(Protocol):
    """An evaluator that sees the whole job.

    One that keeps to `timeout_s` itself, and does not count its compiling as such, may have an
    attribute `grace_s`: so many seconds more it is given before the search gives a job up. Another,
    `goes_by`, may be a dict of what its fitnesses depend on: a search goes on with the same only.
    """

    def evaluate(self, job: Job) -> float | Mapping[str, Any]:
        """The fitness, or a dict with `fitness`, other metrics, and perhaps `trained_values`."""
        ...


class ReturnError(TypeError):
    """The evaluator returned what is no fitness: a mistake in it, not a failed candidate."""


def in_search(
    evaluator: Evaluator, space: Any, run: Path, fitness_policy: str, timeout_s: float | None
) -> Evaluator:
    """An evaluator that can be told what it is to serve, told: by its method `in_search`."""
    told = getattr(evaluator, "in_search", None)
    return told(space, run, fitness_policy, timeout_s) if told else evaluator


def goes_by(evaluator: Evaluator) -> dict[str, Any]:
    """What its fitnesses depend on, as JSON has it: at least its class."""
    own = getattr(evaluator, "goes_by", {})
    if not (isinstance(own, Mapping) and all(isinstance(name, str) for name in own)):
        raise ValueError(
            f"`goes_by` of {type(evaluator).__name__} is {own!r}: expected a dict with texts as "
            "names, or a property that returns one"
        )
    found = {"kind": type(evaluator).__name__, **own}
    return json.loads(json.dumps(found, default=lambda value: type(value).__name__))


def check(evaluate: Any) -> Evaluator:
    """The evaluator, or a function as one; TypeError if it is neither."""
    if hasattr(evaluate, "evaluate"):
        return evaluate
    if callable(evaluate):
        return Function(evaluate)
    raise TypeError(
        f"evaluate {evaluate!r}: expected a function of an architecture, or an object with a "
        "method evaluate(job)"
    )


@dataclass(frozen=True)
class Function:
    """A function of an architecture as an evaluator."""

    function: Callable[[Any], Any]

    @property
    def goes_by(self) -> dict[str, Any]:
        """Its name and module, as far as these stay the same in another process."""
        name, module = (getattr(self.function, f"__{key}__", "") for key in ("name", "module"))
        if not name.isidentifier():  # such as <lambda>
            return {}
        return {"function": name, **({"module": module} if module != "__main__" else {})}

    def evaluate(self, job: Job) -> Any:
        """What the function returns."""
        return self.function(job.architecture)


@dataclass(frozen=True)
class TabularEvaluator:
    """Looks up: `table(architecture)` gives all metrics, of which one is the fitness.

    Such a table is `nas.spaces.nasbench201.Table("cifar10")`, a function, or a dict's `__getitem__`.
    """

    table: Callable[[Any], Mapping[str, float]]
    fitness: str = "valid12"

    @property
    def goes_by(self) -> dict[str, Any]:
        """The column, and of which data if the table says so."""
        dataset = getattr(self.table, "dataset", None)
        return {"fitness": self.fitness, **({} if dataset is None else {"dataset": dataset})}

    def evaluate(self, job: Job) -> Mapping[str, float]:
        """All metrics, and `fitness`."""
        metrics = self.table(job.architecture)
        return {**metrics, "fitness": metrics[self.fitness]}


@dataclass(frozen=True)
class Repeated:
    """The mean of several evaluations with different seeds, for an evaluator with noise.

    Their standard deviation is recorded as the metric `fitness_std`.
    """

    evaluator: Any
    repeats: int = 3
    _inner: Evaluator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats {self.repeats}: expected at least 1")
        object.__setattr__(self, "_inner", check(self.evaluator))

    @property
    def compares(self) -> str | None:
        """As of the inner one."""
        return getattr(self._inner, "compares", None)

    @property
    def grace_s(self) -> float:
        """As of the inner one."""
        return getattr(self._inner, "grace_s", 0.0)

    @property
    def goes_by(self) -> dict[str, Any]:
        """As of the inner one, and how often."""
        return {"repeats": self.repeats, "evaluator": goes_by(self._inner)}

    def in_search(self, *search: Any) -> "Repeated":
        """With the inner one told; see `in_search`."""
        return replace(self, evaluator=in_search(self._inner, *search))

    def evaluate(self, job: Job) -> Mapping[str, float | str]:
        """Means over the repeats, of every metric where it is given; the last's trained values."""
        jobs = [replace(job, seed=job.seed + i) for i in range(self.repeats)]
        found = [read(self._inner.evaluate(one), one) for one in jobs]
        values = [each.fitness if each.fitness is not None else math.nan for each in found]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        kept = found[-1].trained_values
        values_at = {} if kept is None else {TRAINED_VALUES: kept}
        metrics = means([each.metrics for each in found])
        return {**metrics, **values_at, "fitness": mean, "fitness_std": spread}


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those that have it."""
    names = dict.fromkeys(name for metrics in found for name in metrics)
    return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}


def read(returned: Any, job: Job) -> Outcome:
    """What an evaluator returned as an outcome; ReturnError if it cannot be one."""
    named = dict(returned) if isinstance(returned, Mapping) else {"fitness": returned}
    if "fitness" not in named:
        raise ReturnError(
            f"evaluate returned a dict with {', '.join(map(repr, named)) or 'nothing'} for "
            f"candidate {job.candidate}, but its fitness is looked up as 'fitness': add that"
        )
    values = named.pop(TRAINED_VALUES, None)
    if not (values is None or isinstance(values, str)):
        raise ReturnError(
            f"evaluate returned {TRAINED_VALUES} {_show(values)} for candidate {job.candidate}: "
            "expected a text, such as the name of a file with them"
        )
    numbers = {name: _number(name, value, job) for name, value in named.items()}
    fitness = numbers.pop("fitness")
    if not math.isfinite(fitness):
        return Outcome("nan", metrics=numbers, error=f"the fitness is {fitness}")
    return Outcome("ok", fitness, numbers, values)


def _number(name: str, value: Any, job: Job) -> float:
    shape = getattr(value, "shape", ())
    if shape == () and not isinstance(value, str | bytes | bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    of_shape = f" of shape {shape}" if shape else ""
    raise ReturnError(
        f"evaluate returned {_show(value)} ({type(value).__name__}{of_shape}) as {name} of "
        f"candidate {job.candidate}: expected one number"
    )


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def failure(error: BaseException) -> Outcome:
    """The outcome of a job that raised."""
    last = "".join(traceback.format_exception_only(error)).strip()
    return Outcome(_kind(error), error=last[:2000])


def _kind(error: BaseException) -> str:
    if _is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, FloatingPointError):  # also of jax_debug_nans
        return "nan"
    return "timeout" if isinstance(error, TimeoutError) else "exception"


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of an accelerator, whose errors jax raises by this name."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
