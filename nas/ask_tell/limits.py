"""Check architectures against hard limits, and bound retries and failures in a row."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpipe_jax.utils.checks import check_count
from nas.errors import FailuresError
from nas.keywords import suggesting

MAX_REJECTED = 10_000
"""Abort after this many consecutive rejections: the limits are probably too strict."""


@suggesting()
class Limit(NamedTuple):
    """Reject architectures for which a measure is too large, before they are trained.

    The measure is recorded as a metric. A limit without `at_most` records only.

    Args:
        name: Name of the metric.
        measure: Function of an architecture: parameters, operations, latency.
        at_most: Largest value that is allowed. Default: no bound.

    Example:
        >>> limit = Limit("ones", sum, at_most=3)  # one of the argument `limits` of `nas.search`
        >>> limit.measure((1, 0, 1))
        2
        >>> import nas
        >>> costs = nas.NetworkCosts(filters=24)
        >>> Limit("params_m", costs.params_m, 3.2).identity["filters"]
        24
    """

    name: str
    measure: Callable[[Any], float]
    at_most: float = math.inf

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the limit is, as JSON values; a search resumes with the same limits only.

        If the measure is a method of a dataclass, its fields are included. Of any other measure
        only the limit's name identifies it.
        """
        owner: Any = getattr(self.measure, "__self__", None)
        fields = dataclasses.asdict(owner) if dataclasses.is_dataclass(type(owner)) else {}
        bound = None if math.isinf(self.at_most) else self.at_most
        identity = {"name": self.name, "at_most": bound, **fields}
        return json.loads(json.dumps(identity, default=lambda value: type(value).__name__))


class LimitCheck:
    """Measure architectures and count consecutive rejections."""

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits, self._in_a_row = tuple(limits), 0

    def measure(self, architecture: Any) -> tuple[dict[str, float], str | None]:
        """Return the measures, and a description of the first limit that is exceeded."""
        measures: dict[str, float] = {}
        for name, measure, at_most in self.limits:
            measures[name] = float(measure(architecture))
            if not measures[name] <= at_most:  # NaN is rejected too
                return measures, f"{name} {measures[name]:g} is more than {at_most:g}"
        self._in_a_row = 0
        return measures, None

    def measured_in(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return those of the metrics that the limits have measured."""
        return {limit.name: metrics[limit.name] for limit in self.limits if limit.name in metrics}

    def count_rejection(self, exceeded: str) -> None:
        """Count one more rejection.

        Raises:
            FailuresError: There are too many in a row.
        """
        self._in_a_row += 1
        if self._in_a_row >= MAX_REJECTED:
            raise FailuresError(
                f"limits have rejected {MAX_REJECTED} candidates in a row, the last as {exceeded}: "
                "raise that limit"
            )


class FailureCounter:
    """Count consecutive failures of evaluations, up to `at_most`."""

    def __init__(self, at_most: int) -> None:
        self.at_most, self._in_a_row = at_most, 0

    def reset(self) -> None:
        """Start again at zero, after an evaluation that has not failed."""
        self._in_a_row = 0

    def count(self, last: str) -> None:
        """Count one more failure, described by `last`.

        Raises:
            FailuresError: There are too many in a row.
        """
        self._in_a_row += 1
        if self._in_a_row >= self.at_most:
            raise FailuresError(
                f"{self._in_a_row} evaluations have failed in a row (max_failures), the last, "
                f"of {last}"
            )


@suggesting()
@dataclass(frozen=True)
class Retries:
    """Set how often an evaluation is repeated after each kind of failure.

    An architecture that is too slow, too large or diverges would fail again. A dead worker was most
    likely not its fault.

    Args:
        exception: Retries after an exception of the evaluator. Default: 1.
        timeout: Retries after more than `timeout_s` seconds. Default: 0.
        nan: Retries after a fitness that is not finite. Default: 0.
        out_of_memory: Retries after lack of memory, of the host or of an accelerator. Default: 0.
        worker_death: Retries after the death of the worker. Default: 3.

    Raises:
        ValueError: A number is negative or no integer.

    Example:
        >>> Retries(exception=0)  # the argument `retries` of `nas.search`
        Retries(exception=0, timeout=0, nan=0, out_of_memory=0, worker_death=3)
    """

    exception: int = 1
    timeout: int = 0
    nan: int = 0
    out_of_memory: int = 0
    worker_death: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(f"retries.{name}", value, minimum=0)
