"""Provide evaluators that do not train: a table, and repeated evaluation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nas.evaluators.evaluator import TRAINED_VALUES, Evaluator, Job, check, goes_by, in_search
from nas.evaluators.outcomes import means, read


@dataclass(frozen=True)
class TabularEvaluator:
    """Looks up: `table(architecture)` gives all metrics, of which one is the fitness.

    Such a table is `nas.NASBench201Table("cifar10")`, a function, or a dict's `__getitem__`.
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
