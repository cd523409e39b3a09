"""Define what the driver needs of a pool of workers: `WorkerPool`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _always(future: Any) -> bool:
    return True


def _nothing() -> None:
    """Do nothing: the pool belongs to the user, who closes it."""


def _none_lost() -> int:
    return 0


@dataclass(frozen=True)
class WorkerPool:
    """Run jobs somewhere; every pool is made of these functions."""

    submit: Callable[..., Any]  # as of an executor: returns a future
    slots: int  # jobs at once, at the start
    pickles: bool  # whether jobs go to other processes
    expire: Callable[[Any], None]  # abandon a future that takes too long
    has_begun: Callable[[Any], bool] = _always  # whether a future no longer waits for a worker
    close: Callable[[], None] = _nothing
    count_lost: Callable[[], int] = _none_lost  # slots that are lost; at most all but one
