"""Check architectures against hard limits, and bound retries and failures in a row."""

import dataclasses
import json
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpipe_jax.utils.checks import check_count
from nas.errors import FailuresError
from nas.evaluators.evaluator import Outcome
from nas.evaluators.outcomes import failed_outcome
from nas.keywords import suggesting
from nas.spaces import copies

MAX_REJECTED = 10_000
"""Abort after this many consecutive rejections: the limits are probably too strict."""


@suggesting()
class Limit(NamedTuple):
    """Reject architectures for which a measure is too large, before they are trained.

    The measure is recorded as a metric. A limit without `at_most` records only. Unless the search
    has `cache=False`, equal networks are measured once. A measure that raises is a failure of the
    candidate, and so is NaN where there is a bound.

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


class Measures(NamedTuple):
    """Hold what the limits say of an architecture."""

    metrics: dict[str, float]
    exceeded: str | None = None  # describes the first limit that is exceeded
    failure: Outcome | None = None  # of the first measure that fails


class LimitCheck:
    """Measure architectures and count consecutive rejections."""

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits, self._in_a_row = tuple(limits), 0
        for limit in self.limits:
            _check_limit(limit)
        self._last_reason = ""

    def measure(self, architecture: Any) -> Measures:
        """Measure up to the first limit that is exceeded or fails; this may take minutes."""
        metrics: dict[str, float] = {}
        for name, measure, at_most in self.limits:
            started = time.time()
            try:
                metrics[name] = value = float(measure(copies.own(architecture)))
                if math.isnan(value) and at_most < math.inf:
                    raise FloatingPointError(f"nan cannot be compared with at_most {at_most:g}")
            except (Exception, SystemExit) as error:  # the user's own code may raise anything
                failed = failed_outcome(error)
                text = f"limit {name!r}: {failed.error}"
                times = {"started": started, "finished": time.time()}
                failed = failed._replace(error=text, worker="limits", **times)
                return Measures(metrics, failure=failed)
            if value > at_most:
                return Measures(metrics, f"{name} {value:g} is more than {at_most:g}")
        return Measures(metrics)

    def is_measured(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the metrics have those of all limits."""
        return all(limit.name in metrics for limit in self.limits)

    def measured_in(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return those of the metrics that the limits have measured."""
        return {limit.name: metrics[limit.name] for limit in self.limits if limit.name in metrics}

    def accept(self) -> None:
        """Start to count at zero, after a candidate that is evaluated or answered."""
        self._in_a_row = 0

    def count_rejection(self, reason: str) -> None:
        """Count one more candidate that is not evaluated."""
        self._in_a_row, self._last_reason = self._in_a_row + 1, reason

    def check_rejections(self) -> None:
        """Raise FailuresError if there were too many rejections in a row."""
        if self._in_a_row >= MAX_REJECTED:
            raise FailuresError(
                f"the search has rejected {MAX_REJECTED} candidates in a row, the last as "
                f"{self._last_reason}: raise that limit, or let the space have other networks"
            )


def _check_limit(limit: Limit) -> None:
    name, measure, at_most = limit
    if not (isinstance(name, str) and name):
        raise TypeError(f"limit {name!r}: expected a text as the name of its metric")
    if not callable(measure):
        raise TypeError(
            f"limit {name!r}: measure {measure!r} cannot be called; give a function of an "
            "architecture"
        )
    is_number = isinstance(at_most, numbers.Real) and not isinstance(at_most, bool)
    if not is_number or math.isnan(at_most):
        raise ValueError(f"limit {name!r}: at_most {at_most!r} must be a number, and not NaN")


class FailureCounter:
    """Count consecutive failures of evaluations, or of proposals, up to `at_most`."""

    def __init__(self, at_most: int, what: str = "evaluations") -> None:
        self.at_most, self._what, self._in_a_row = at_most, what, 0

    def reset(self) -> None:
        """Start again at zero, after one that has not failed."""
        self._in_a_row = 0

    def count(self, last: str) -> None:
        """Count one more failure, described by `last`.

        Raises:
            FailuresError: There are too many in a row.
        """
        self._in_a_row += 1
        if self._in_a_row >= self.at_most:
            raise FailuresError(
                f"{self._in_a_row} {self._what} have failed in a row (max_failures); the last "
                f"was {last}"
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
        nan: Retries after a fitness of NaN, or of the infinity that nothing beats. Default: 0.
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
