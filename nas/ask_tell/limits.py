"""Hard limits on architectures, how often failures are tried again, and when they are too many."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nas.errors import FailuresError

MAX_REJECTED = 10_000
"""So many rejections in a row, and it is the limits that are wrong."""


class Limit(NamedTuple):
    """An architecture for which `measure` gives more than `at_most` is never trained.

    `measure` is any function of an architecture: parameters, operations, latency. It is recorded
    as a metric, which is all that a limit without `at_most` does.
    """

    name: str
    measure: Callable[[Any], float]
    at_most: float = math.inf

    @property
    def identity(self) -> dict[str, Any]:
        """What it is, as JSON has it; of a function all that is known is the name given to it."""
        owner: Any = getattr(self.measure, "__self__", None)
        fields = dataclasses.asdict(owner) if dataclasses.is_dataclass(type(owner)) else {}
        bound = None if math.isinf(self.at_most) else self.at_most
        found = {"name": self.name, "at_most": bound, **fields}
        return json.loads(json.dumps(found, default=lambda value: type(value).__name__))


class LimitCheck:
    """Lets candidates pass that keep all limits."""

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.limits, self._in_a_row = tuple(limits), 0

    def measure(self, architecture: Any) -> tuple[dict[str, float], str | None]:
        """What the limits measure, and in words the first that is broken."""
        found: dict[str, float] = {}
        for name, measure, at_most in self.limits:
            found[name] = float(measure(architecture))
            if not found[name] <= at_most:
                return found, f"{name} {found[name]:g} is more than {at_most:g}"
        self._in_a_row = 0
        return found, None

    def measured_in(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of the metrics that the limits have measured."""
        return {limit.name: metrics[limit.name] for limit in self.limits if limit.name in metrics}

    def count_rejection(self, broken: str) -> None:
        """One more is rejected; FailuresError if that is one too many."""
        self._in_a_row += 1
        if self._in_a_row >= MAX_REJECTED:
            raise FailuresError(
                f"limits have rejected {MAX_REJECTED} candidates in a row, the last as {broken}: "
                "raise that limit"
            )


class FailureCounter:
    """Counts evaluations that fail in a row, up to `at_most`."""

    def __init__(self, at_most: int) -> None:
        self.at_most, self._in_a_row = at_most, 0

    def reset(self) -> None:
        """An evaluation has not failed."""
        self._in_a_row = 0

    def count(self, last: str) -> None:
        """One more has failed, in words `last`; FailuresError if that is one too many."""
        self._in_a_row += 1
        if self._in_a_row >= self.at_most:
            raise FailuresError(
                f"{self._in_a_row} evaluations have failed in a row (max_failures), the last, "
                f"of {last}"
            )


@dataclass(frozen=True)
class Retries:
    """How often an evaluation is tried again after each kind of failure.

    An architecture that is too slow, too large or diverges would be so again; a dead worker was
    most likely not its fault.
    """

    exception: int = 1
    timeout: int = 0
    nan: int = 0
    out_of_memory: int = 0
    worker_death: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"retries.{name} {value!r}: expected a whole number, 0 or more")
