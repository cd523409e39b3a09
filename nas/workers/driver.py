"""The loop that keeps the workers busy: ask, submit, collect, report."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nas.ask_tell.search import Search
from nas.errors import WorkersError
from nas.evaluators.evaluator import Evaluator, Job, Outcome
from nas.workers import task
from nas.workers.dask import WorkerPool

Callback = Callable[[Search], object]
POLL_S = 0.5
BEGIN_S = 120.0  # how long a job may wait for a worker, such as one that is restarted


def check_seconds(**limits: float | None) -> None:
    """Raise ValueError for a limit that is no time."""
    for name, value in limits.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):
            raise ValueError(
                f"{name} {value!r}: expected seconds, more than 0, or None for no limit"
            )


class RunningJob(NamedTuple):
    """A job that is being done."""

    job: Job
    future: Any
    deadline: float  # of time.monotonic
    begun: bool = False


@dataclass
class Driver:
    """Keeps a pool's slots full with a search's jobs, until the search is over."""

    search: Search
    evaluator: Evaluator
    pool: WorkerPool
    timeout_s: float | None = None
    time_limit_s: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._end = math.inf  # of time.monotonic
        self._grace_s = self.evaluator.grace_s
        self._job_s = math.inf if self.timeout_s is None else self.timeout_s + self._grace_s
        self._told = self.search.evolution.results  # of how many the callback knows
        self._task = task.make_task(self.evaluator, self.pool.pickles)
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._flights: dict[int, RunningJob] = {}
        self._expired: dict[int, RunningJob] = {}

    def run(self) -> None:
        """To the end of the search; the store and the pool are closed then, whatever ends it."""
        self._end = time.monotonic() + (self.time_limit_s or math.inf)
        try:
            while not self._is_to_end():
                self._fill()
                if not self._flights or self.search.is_over:
                    break
                self._collect()
        finally:
            for flight in self._flights.values():
                flight.future.cancel()
            self.search.close()
            self.pool.close()

    def _is_to_end(self) -> bool:
        """Whether it is stopped, or out of time; what the cache has answered is told before."""
        if self.search.evolution.results != self._told:
            self._call_back()
        return self.stopping.is_set() or time.monotonic() >= self._end

    def _fill(self) -> None:
        while len(self._flights) < self.pool.slots - self.pool.count_lost():
            # A limit may be measured for minutes: what has ended is written before, and between.
            job = self.search.ask(until=lambda: self._is_to_end() or not self._done.empty())
            if job is None and self._done.empty():
                return
            while not self._done.empty():
                self._settle(self._done.get())
            if job is None:
                continue
            try:
                future = self.pool.submit(self._task, job)
            except WorkersError:
                raise
            except RuntimeError as error:  # such as BrokenProcessPool, or one that is shut down
                raise WorkersError(
                    f"the workers take no more jobs ({error}): use workers='processes', whose "
                    "workers are restarted, and resume the run"
                ) from error
            deadline = time.monotonic() + BEGIN_S + self._job_s
            self._flights[job.evaluation] = RunningJob(job, future, deadline)
            future.add_done_callback(lambda _, number=job.evaluation: self._done.put(number))

    def _collect(self) -> None:
        """Report what is done, or wait for it a while."""
        self._expire()
        first = min((flight.deadline for flight in self._flights.values()), default=self._end)
        wait = min(first, self._end) - time.monotonic()
        try:
            number = self._done.get(timeout=max(0.0, min(wait, POLL_S)))
        except queue.Empty:
            return
        self._settle(number)

    def _settle(self, number: int) -> None:
        """Report what an evaluation that has ended came to."""
        if number in self._flights:
            flight = self._flights.pop(number)
            self._report(flight.job, task.outcome(flight.future))
        else:
            flight = self._expired.pop(number)
            self.search.report(flight.job, Outcome("timeout"))  # late, and only noted

    def _expire(self) -> None:
        if self.timeout_s is None:
            return
        now = time.monotonic()
        for number, flight in list(self._flights.items()):
            if not flight.begun and self.pool.has_begun(flight.future):
                flight = flight._replace(begun=True, deadline=now + self._job_s)
                self._flights[number] = flight
            if flight.deadline <= now and not flight.future.done():
                self._expired[number] = self._flights.pop(number)
                self.pool.expire(flight.future)
                more = f", and {self._grace_s:g} s to compile" if self._grace_s else ""
                text = f"took more than timeout_s {self.timeout_s:g}{more}"
                self._report(flight.job, Outcome("timeout", error=text))

    def _report(self, job: Job, outcome: Outcome) -> None:
        self.search.report(job, outcome)
        self._call_back()

    def _call_back(self) -> None:
        self._told = self.search.evolution.results
        if self.callback is not None and self.callback(self.search) is True:
            self.stopping.set()


class DriverThread:
    """A driver at work, perhaps in a thread of its own."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._thread = threading.Thread(target=self._run, name="nas driver", daemon=True)
        self._error: BaseException | None = None

    @property
    def cycles(self) -> int:
        """The number of results at which the search is over."""
        return self._driver.search.cycles

    @property
    def error(self) -> BaseException | None:
        """What it has ended with, if an error, until `wait` raises it; waits for the end."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._error

    def run(self) -> None:
        """In this thread."""
        self._driver.run()

    def start(self) -> None:
        """In a thread of its own."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._driver.run()
        except BaseException as error:
            self._error = error

    @property
    def is_alive(self) -> bool:
        """Whether it is at work in the background."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Have it end soon."""
        self._driver.stopping.set()

    def wait(self, timeout_s: float | None) -> None:
        """Wait for its end; raises what it has ended with, once."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        error, self._error = self._error, None
        if error is not None:
            raise error
