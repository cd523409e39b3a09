"""Define jobs, their outcomes, and the evaluators that turn one into the other.

    Job --> Evaluator.evaluate --> number or dict --> Outcome

An evaluator is one of three things; `as_evaluator` turns each into an `Evaluator`:

    a function of an architecture       returns the fitness, or a dict with `fitness` and metrics
    an object with `evaluate(job)`      the same, but it gets the whole `Job`
    a subclass of `Evaluator`           the same, with the optional members declared
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

FAILURES = ("exception", "timeout", "nan", "out_of_memory", "worker_death")
TRAINED_VALUES = "trained_values"
"""Name in an evaluator's dict of the location of trained weights."""

RUNG = "rung_accuracy"
"""Metric that decides whether a candidate is hopeless: validation accuracy after `stop_epoch`."""


@dataclass(frozen=True)
class Job:
    """Describe one attempt to train one candidate.

    `Search.ask` returns jobs, and workers receive them.

    Attributes:
        evaluation: Number of this evaluation in the store.
        candidate: Number of the candidate.
        architecture: The candidate's architecture, a value of the search space.
        seed: Seed for all randomness of the evaluator. It is the same in every attempt, so that
            results repeat.
        attempt: Number of the attempt, from 1. Default: 1.
        tournament: For a member that is trained again, the candidate whose parent it may become;
            otherwise None. Default: None.
        inherit: Location of trained weights to start from, or None. It is what an evaluation
            returned as `trained_values`. With `retrain_warm` a member that is trained again starts
            from its own weights, and a child from its parent's. Default: None.
        rivals: Values of the metric that the search compares by, of the population's members at
            the time of the proposal. Empty if the search compares by none. Default: ().
        run: The search that handed the job out, the only one that takes its fitness; empty if any
            search may take it. Default: "".
    """

    evaluation: int
    candidate: int
    architecture: Any
    seed: int
    attempt: int = 1
    tournament: int | None = None
    inherit: str | None = None
    rivals: tuple[float, ...] = ()
    run: str = ""


def job_seed(search_seed: int, candidate: int, tournament: int | None = None) -> int:
    """Derive a job's seed, a number of 31 bits, from the search's seed."""
    return Random(f"{search_seed} {candidate} {tournament} evaluation").getrandbits(31)


class Outcome(NamedTuple):
    """Hold the result of a job: a fitness, or the kind of its failure."""

    kind: str  # "ok", or one of `FAILURES`
    fitness: float | None = None
    metrics: Mapping[str, float] = {}
    trained_values: str | None = None  # where the evaluator stored the trained weights
    error: str | None = None
    worker: str | None = None
    started: float | None = None  # seconds since 1970
    finished: float | None = None


class Evaluator:
    """Measure the fitness of architectures: the base class of evaluators.

    Only `evaluate` is required. The other members have defaults. An attribute may be set in the
    class or in `__init__`, or be a dataclass field or a property. Inherit from this class to
    declare them: in other objects these attributes are refused, and `prepare` is ignored.

    Attributes:
        identity: What the fitness depends on, by name. A search resumes only with an evaluator
            whose values are the same. Default: nothing.
        rivals_metric: Name of the metric whose values jobs get in `Job.rivals`; default: None, for
            no metric.
        compile_grace_s: Seconds that a job may take in addition to the search's `timeout_s`;
            default 0. For evaluators that check `timeout_s` themselves and do not count
            compilation.

    Example::

        class Accuracy(nas.Evaluator):
            identity = {"data": "digits, version 2"}

            def evaluate(self, job):
                return {"fitness": train(job.architecture, job.seed), "epochs": 20}
    """

    identity: Mapping[str, Any] = MappingProxyType({})
    rivals_metric: str | None = None
    compile_grace_s: float = 0.0

    def prepare(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> "Evaluator":
        """Return the evaluator that this search uses, before its first job.

        Args:
            space: The search space.
            folder: The run's folder.
            fitness_policy: See `nas.Settings`.
            timeout_s: Seconds for one evaluation, or None for no limit.

        Raises:
            ValueError, OSError: The evaluator cannot serve this search.
        """
        return self

    def evaluate(self, job: Job) -> float | Mapping[str, Any]:
        """Measure the fitness of a job's architecture.

        An error that this raises is a failure, which the search may retry.

        Args:
            job: The architecture, the seed, and the weights to start from.

        Returns:
            The fitness, or a dict with `fitness`, other metrics and `trained_values`. The worst
            fitness is infinite: -inf if the search maximises, as for a network that is infeasible.
            It is a result, which joins the population. NaN and the other infinity are failures.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method evaluate(job): define it")


def as_evaluator(evaluate: Any) -> Evaluator:
    """Return an `Evaluator` for a function, an object with `evaluate`, or an `Evaluator`.

    Raises:
        TypeError: It is something else, such as a class; or it declares members without being an
            `Evaluator`.
    """
    if isinstance(evaluate, Evaluator):
        _check_members(evaluate)
        return evaluate
    if hasattr(evaluate, "evaluate"):
        if isinstance(evaluate, type):
            raise TypeError(
                f"evaluate is the class {evaluate.__name__}: expected an object of it, such as "
                f"{evaluate.__name__}()"
            )
        _check_declares_nothing(evaluate)
        return Adapter(evaluate)
    if callable(evaluate):
        return Function(evaluate)
    raise TypeError(
        f"evaluate {evaluate!r}: expected a function of an architecture, or an object with a "
        "method evaluate(job)"
    )


def _check_members(evaluator: Evaluator) -> None:
    """Check the declared members of an evaluator, which a search uses much later."""
    kind = type(evaluator).__name__
    metric, grace_s = evaluator.rivals_metric, evaluator.compile_grace_s
    if not (metric is None or isinstance(metric, str)):
        raise TypeError(
            f"`rivals_metric` of {kind} is {metric!r}: expected the name of a metric, or None"
        )
    is_number = isinstance(grace_s, Real) and not isinstance(grace_s, bool)
    if not (is_number and 0 <= grace_s < math.inf):
        raise TypeError(f"`compile_grace_s` of {kind} is {grace_s!r}: expected seconds, at least 0")


def prepared(
    evaluator: Evaluator, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
) -> Evaluator:
    """Return what `Evaluator.prepare` of this evaluator returns.

    Raises:
        TypeError: It is no evaluator.
        ValueError, OSError: The evaluator cannot serve this search.
    """
    made = evaluator.prepare(space, folder, fitness_policy, timeout_s)
    if made is None:
        raise TypeError(
            f"`prepare` of {type(evaluator).__name__} returned None: expected the evaluator to "
            "use; end it with `return self`"
        )
    return as_evaluator(made)


def _check_declares_nothing(evaluate: Any) -> None:
    """Refuse an object that declares a member which would count only in an `Evaluator`.

    Without its identity, two different evaluators would count as equal when a search resumes.
    """
    for name in ("identity", "rivals_metric", "compile_grace_s"):
        if hasattr(evaluate, name):
            raise TypeError(
                f"{type(evaluate).__name__} has a member `{name}`, which counts only in a subclass "
                f"of nas.Evaluator: inherit from nas.Evaluator to declare `{name}`, or rename it"
            )


def identity_of(evaluate: Any) -> dict[str, Any]:
    """Return the evaluator's class and what its fitness depends on, as JSON values.

    Raises:
        ValueError: Its `identity` is not a dict with texts as names.
    """
    evaluator = as_evaluator(evaluate)
    declared = evaluator.wrapped if isinstance(evaluator, Adapter) else evaluator
    kind, own = type(declared).__name__, evaluator.identity
    if not (isinstance(own, Mapping) and all(isinstance(name, str) for name in own)):
        raise ValueError(
            f"`identity` of {kind} is {own!r}: expected a dict with texts as "
            "names, or a property that returns one"
        )
    identity = {"kind": kind, **own}
    try:
        return json.loads(json.dumps(identity, default=lambda value: type(value).__name__))
    except (TypeError, ValueError) as error:  # other keys than texts, or a loop
        raise ValueError(
            f"`identity` of {kind} cannot be stored as JSON ({error}): use texts, numbers, lists, "
            "and dicts with texts as names"
        ) from error


@dataclass(frozen=True)
class Adapter(Evaluator):
    """Adapt an object with a method `evaluate` that does not inherit from `Evaluator`.

    This is the only place that looks for optional members. It looks for the names of versions
    before 0.2, which had no base class. The present names count only where a class inherits from
    `Evaluator`: `prepare`, a common word, is ignored elsewhere, and the others are refused.
    """

    wrapped: Any

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the wrapped object's, or the default."""
        return getattr(self.wrapped, "goes_by", Evaluator.identity)

    @property
    def rivals_metric(self) -> str | None:
        """Return the wrapped object's, or the default."""
        return getattr(self.wrapped, "compares", Evaluator.rivals_metric)

    @property
    def compile_grace_s(self) -> float:
        """Return the wrapped object's, or the default."""
        return getattr(self.wrapped, "grace_s", Evaluator.compile_grace_s)

    def prepare(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> Evaluator:
        """Call the wrapped object's method, if it has one."""
        prepare = getattr(self.wrapped, "in_search", None)
        if prepare is None:
            return self
        return as_evaluator(prepare(space, folder, fitness_policy, timeout_s))

    def evaluate(self, job: Job) -> float | Mapping[str, Any]:
        """Return what the wrapped object returns."""
        return self.wrapped.evaluate(job)


@dataclass(frozen=True)
class Function(Evaluator):
    """Adapt a function of an architecture."""

    function: Callable[[Any], Any]

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the function's name and module, if they are the same in another process."""
        name = getattr(self.function, "__name__", "")
        module = getattr(self.function, "__module__", "")
        if not name.isidentifier():  # such as <lambda>
            return {}
        return {"function": name} if module == "__main__" else {"function": name, "module": module}

    def evaluate(self, job: Job) -> Any:
        """Return what the function returns."""
        return self.function(job.architecture)
