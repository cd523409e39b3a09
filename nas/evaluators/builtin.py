"""Provide evaluators that do not train: a table, and repeated evaluation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean
from nas.errors import ReturnError
from nas.evaluators.evaluator import (
    TRAINED_VALUES,
    Evaluator,
    Job,
    as_evaluator,
    identity_of,
    prepared,
)
from nas.evaluators.nasbench201_table import NASBench201Table
from nas.evaluators.outcomes import as_outcome, mean_metrics
from nas.keywords import suggesting
from nas.spaces import copies


@suggesting()
@dataclass(frozen=True)
class TabularEvaluator(Evaluator):
    """Look up the metrics of an architecture in a table; one of them is the fitness.

    Args:
        table: A function of an architecture that returns all metrics: `nas.NASBench201Table`, a
            function of yours, or the `__getitem__` of a dict. If it has an attribute `dataset`, a
            search resumes only with the same one.
        fitness: Name of the metric that is the fitness. A search checks at its start that the table
            has it. Default: "valid12", of NAS-Bench-201.

    Raises:
        TypeError: `table` cannot be called, or `fitness` is not a text.

    Example:
        >>> table = {(0, 1): {"accuracy": 0.5}, (1, 1): {"accuracy": 0.75}}
        >>> evaluator = TabularEvaluator(table.__getitem__, fitness="accuracy")
        >>> evaluator.evaluate(Job(evaluation=1, candidate=0, architecture=(1, 1), seed=0))
        {'accuracy': 0.75, 'fitness': 0.75}
    """

    table: Callable[[Any], Mapping[str, float]]
    fitness: str = "valid12"

    def __post_init__(self) -> None:
        if not callable(self.table):
            kind = type(self.table).__name__
            raise TypeError(
                f"table of type {kind}: expected a function of an architecture that returns a dict "
                "of metrics; of a dict give its `__getitem__`"
            )
        if not isinstance(self.fitness, str):
            raise TypeError(f"fitness {self.fitness!r}: expected the name of a metric of the table")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the metric's name, and the table's data set if it has one."""
        dataset = getattr(self.table, "dataset", None)
        own = {"fitness": self.fitness}
        return own if dataset is None else {**own, "dataset": dataset}

    def prepare(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> "TabularEvaluator":
        """Look up any architecture, to see that the table has the metric.

        Raises:
            ValueError: It lacks the metric, or belongs to another space.
            OSError: Its file cannot be read.
        """
        try:
            metrics = self.table(space.random(Random(0)))
        except Exception:  # a table of the user's may lack this architecture
            if isinstance(self.table, NASBench201Table):
                raise
            return self
        if problem := self._problem(metrics):
            raise ArgumentError("fitness", problem)
        return self

    def evaluate(self, job: Job) -> Mapping[str, float]:
        """Return all metrics and `fitness`.

        Raises:
            ReturnError: The table has no such metric.
            LookupError: It does not have the architecture.
        """
        try:
            metrics = self.table(job.architecture)
        except KeyError as error:
            raise LookupError(
                f"the table has no entry for {job.architecture!r} (KeyError: {error}): add it, or "
                "search a space whose architectures are all in the table"
            ) from error
        if problem := self._problem(metrics):
            raise ReturnError(problem)
        return {**metrics, "fitness": metrics[self.fitness]}

    def _problem(self, metrics: Any) -> str | None:
        """Say why these cannot be the metrics of an architecture; return None if they can."""
        if not isinstance(metrics, Mapping):
            kind = type(metrics).__name__
            return f"the table returned a value of type {kind}: expected a dict of metrics"
        if self.fitness in metrics:
            return None
        hint = did_you_mean(self.fitness, metrics) or "; give one of these as `fitness`"
        names = ", ".join(map(str, metrics)) or "nothing"
        return f"`fitness` {self.fitness!r} is not in the table, which has {names}{hint}"


@suggesting()
@dataclass(frozen=True)
class Repeated(Evaluator):
    """Average several evaluations with different seeds, for an evaluator with noise.

    The seeds are the job's seed and the numbers after it. The standard deviation is recorded as
    the metric `fitness_std`. Each other metric is the mean over the repeats that have it.

    Args:
        evaluator: Any evaluator, as for `nas.search`.
        repeats: Number of evaluations, at least 1. Default: 3.

    Raises:
        ValueError: `repeats` is not a whole number of at least 1.
        TypeError: `evaluator` is not an evaluator.

    Example:
        >>> evaluator = Repeated(sum, repeats=2)
        >>> evaluator.evaluate(Job(evaluation=1, candidate=0, architecture=(1, 1), seed=0))
        {'fitness': 2.0, 'fitness_std': 0.0}
    """

    evaluator: Any
    repeats: int = 3

    def __post_init__(self) -> None:
        check_count("repeats", self.repeats)
        object.__setattr__(self, "repeats", int(self.repeats))  # of NumPy: no JSON
        as_evaluator(self.evaluator)

    @property
    def _inner(self) -> Evaluator:
        return as_evaluator(self.evaluator)

    @property
    def rivals_metric(self) -> str | None:
        """Return the inner evaluator's."""
        return self._inner.rivals_metric

    @property
    def compile_grace_s(self) -> float:
        """Return the inner evaluator's."""
        return self._inner.compile_grace_s

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the number of repeats and the inner evaluator's identity."""
        return {"repeats": self.repeats, "evaluator": identity_of(self._inner)}

    def prepare(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> "Repeated":
        """Prepare the inner evaluator."""
        inner = prepared(self._inner, space, folder, fitness_policy, timeout_s)
        return replace(self, evaluator=inner)

    def evaluate(self, job: Job) -> Mapping[str, float | str]:
        """Return means over the repeats, and the trained weights of the last one."""
        inner = self._inner
        jobs = [
            replace(job, seed=job.seed + i, architecture=copies.own(job.architecture))
            for i in range(self.repeats)
        ]
        outcomes = [as_outcome(inner.evaluate(each), each) for each in jobs]
        values = [math.nan if each.fitness is None else each.fitness for each in outcomes]
        mean = sum(values) / len(values)
        spread = _standard_deviation(values, mean)
        weights = outcomes[-1].trained_values
        stored = {} if weights is None else {TRAINED_VALUES: weights}
        metrics = mean_metrics([each.metrics for each in outcomes])
        return {**metrics, **stored, "fitness": mean, "fitness_std": spread}


def _standard_deviation(values: Sequence[float], mean: float) -> float:
    """Return that of finite values; of infinite ones 0 if all are equal, and infinity otherwise."""
    if math.isinf(mean):
        return 0.0 if len(set(values)) == 1 else math.inf
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
