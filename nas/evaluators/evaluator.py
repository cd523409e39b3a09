"""What tells how good an architecture is, and all that can come of asking.

An evaluator is a function of an architecture that returns its fitness, or a dict with `fitness` and
any other numbers to record; or an object with a method `evaluate(job)` that returns the same, which
sees the whole `Job`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
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
