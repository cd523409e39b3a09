"""Define what the driver needs of a pool of workers: `WorkerPool`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nas.pickles.sending import Share, in_each_job


def _always(future: Any) -> bool:
    return True


def _cancel(future: Any) -> None:
    future.cancel()


def _nothing() -> None:
    """Do nothing: the pool belongs to the user, who closes it."""


@dataclass(frozen=True)
class WorkerPool:
    """Run jobs somewhere; every pool is made of these functions."""

    submit: Callable[..., Any]  # as of an executor: returns a future
    count_slots: Callable[[], int]  # jobs at once, now; 0 while there are no workers
    pickles: bool  # whether jobs go to other processes
    expire: Callable[[Any], None] = _cancel  # abandon a future that takes too long
    has_begun: Callable[[Any], bool] = _always  # whether a future no longer waits for a worker
    close: Callable[[], None] = _nothing
    cancel: Callable[[Any], None] = _cancel  # a future that nobody waits for; without waiting
    name: str = "the pool"  # in errors
    share: Share = in_each_job  # for a pickled evaluator: how its workers get it
