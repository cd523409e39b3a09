"""Keep the workers busy: ask for jobs, submit them, and report their outcomes.

Workers may come and go. If there are none for `BEGIN_S`, the search ends, and can be resumed.

Search.ask --> pool.submit --> running --> finished --> Search.report --> callback
                                  |                          ^
                                  +-- past its deadline: ----+
                                      expired, reported as a time-out
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

from nas.ask_tell.search import Search
from nas.errors import ReturnError, WorkersError
from nas.evaluators.evaluator import Evaluator, Job, Outcome
from nas.evaluators.outcomes import failed_outcome
from nas.evolution.length import Length
from nas.workers import main_guard, task
from nas.workers.asking import AskingThreads
from nas.workers.worker_pool import WorkerPool

Callback = Callable[[Search], object]
POLL_S = 0.5  # s between two looks at deadlines and requests to stop
BEGIN_S = 120.0  # s that a job may wait for a worker, such as one that is restarted


def check_seconds(**limits: float | None) -> None:
    """Raise ValueError for a time limit that is not a positive number or None."""
    for name, value in limits.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (is_number and value > 0):
            raise ValueError(
                f"{name} {value!r}: expected seconds, more than 0, or None for no limit"
            )


class RunningJob(NamedTuple):
    """Hold a job that was submitted."""

    job: Job
    future: Any
    deadline: float  # on the clock time.monotonic
    has_begun: bool = False  # whether it no longer waits for a worker


@dataclass
class Driver:
    """Keep all slots of a pool busy with a search's jobs, until the search is over."""

    search: Search
    evaluator: Evaluator
    pool: WorkerPool
    timeout_s: float | None = None
    time_limit_s: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._end = math.inf  # on the clock time.monotonic
        self._grace_s = self.evaluator.compile_grace_s
        self._job_s = math.inf if self.timeout_s is None else self.timeout_s + self._grace_s
        self._called_back = self.search.evolution.results  # results at the last callback
        self._task = task.make_task(self.evaluator, self.pool)
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._last_workers = math.inf  # when there were any, on the clock time.monotonic
        self._is_idle, self._reports = False, 0  # idle: no job until another report
        self._asking = self._asking_threads()
        self._running: dict[int, RunningJob] = {}  # by evaluation
        self._expired: dict[int, RunningJob] = {}  # by evaluation, until their futures end

    def run(self) -> None:
        """Run the search to its end, and close the store and the pool in any case."""
        self._last_workers = time.monotonic()
        self._end = self._last_workers + (self.time_limit_s or math.inf)
        try:
            with main_guard.quiet_workers():
                self._work()
        finally:
            for running in self._running.values():
                self.pool.cancel(running.future)
            if self._asking is not None:
                self._asking.close()
            try:
                self.search.close()  # raises if the folder is gone
            finally:
                self.pool.close()

    def _work(self) -> None:
        while not self._must_end():
            self._fill()
            if self.search.is_over or (self._is_idle and not self._busy):
                return
            self._collect()

    @property
    def _busy(self) -> int:
        """Count the jobs that run, or are asked for."""
        return len(self._running) + (self._asking.count if self._asking else 0)

    def _asking_threads(self) -> AskingThreads | None:
        """Return threads that ask, if asking takes long; only a limit does."""
        if not self.search.limit_check.limits:
            return None

        def must_end() -> bool:
            return self.stopping.is_set() or time.monotonic() >= self._end

        return AskingThreads(self.search, must_end)

    def _count_slots(self) -> int:
        """Return the number of jobs at once.

        Raises:
            WorkersError: It has been 0 for too long.
        """
        slots, now = self.pool.count_slots(), time.monotonic()
        if slots:
            self._last_workers = now
        elif now - self._last_workers > BEGIN_S:
            raise WorkersError(
                f"{self.pool.name} has had no workers for {BEGIN_S:g} s: start some, then resume "
                "the run; all results until now are stored"
            )
        return slots

    def _must_end(self) -> bool:
        """Return whether the driver is stopped or out of time.

        Call back before, if the cache has answered candidates.
        """
        if self.search.evolution.results != self._called_back:
            self._call_back()
        return self.stopping.is_set() or time.monotonic() >= self._end

    def _fill(self) -> None:
        """Submit jobs until all slots are busy or there is no job now."""

        def has_other_work() -> bool:
            return self._must_end() or not self._events.empty()

        while self._busy < self._count_slots() and not self._is_idle:
            if self._asking is not None:
                if self._asking.is_full:
                    return
                self._asking.ask(partial(self._on_answer, self._reports))
                continue
            job = self.search.ask(until=has_other_work)
            self._is_idle = job is None and self._events.empty()
            while not self._events.empty():
                self._events.get()()
            if job is not None:
                self._submit(job)

    def _on_answer(self, reports: int, answer: Future) -> None:
        self._events.put(partial(self._take_answer, reports, answer))

    def _take_answer(self, reports: int, answer: Future) -> None:
        """Submit the job of an answer to a question that was asked after `reports` reports."""
        assert self._asking is not None
        job = self._asking.take(answer)
        if job is not None:
            self._submit(job)
        elif reports == self._reports:  # else there may be a job by now
            self._is_idle = True

    def _submit(self, job: Job) -> None:
        argument = task.pickled_job(job) if self.pool.pickles else job
        try:
            future = self.pool.submit(self._task, argument)
        except WorkersError:
            raise
        except RuntimeError as error:  # BrokenProcessPool, or an executor that is shut down
            raise WorkersError(
                f"the workers take no more jobs ({error}): use workers='processes', whose "
                f"workers are restarted, and resume the run; {main_guard.ADVICE}"
            ) from error
        deadline = time.monotonic() + BEGIN_S + self._job_s
        self._running[job.evaluation] = RunningJob(job, future, deadline)
        settle = partial(self._settle, job.evaluation)
        future.add_done_callback(lambda _: self._events.put(settle))

    def _collect(self) -> None:
        """Report jobs that have expired, and handle one event; wait for it a while."""
        self._expire()
        first = min((running.deadline for running in self._running.values()), default=self._end)
        wait = min(first, self._end) - time.monotonic()
        try:
            handle = self._events.get(timeout=max(0.0, min(wait, POLL_S)))
        except queue.Empty:
            return
        handle()

    def _settle(self, evaluation: int) -> None:
        """Report an evaluation whose future has ended."""
        if evaluation in self._running:
            running = self._running.pop(evaluation)
            self._report_future(running.job, running.future)
        else:
            expired = self._expired.pop(evaluation)
            self.search.report(expired.job, Outcome("timeout"))  # too late: only logged

    def _report_future(self, job: Job, future: Any) -> None:
        """Report the outcome of a future that has ended.

        Raises:
            ReturnError: The evaluator returned no fitness, and has never returned one.
        """
        try:
            outcome = task.outcome_of(future)
        except ReturnError as error:
            self._report(job, failed_outcome(error))
            if not self.search.evolution.results:
                raise
            return
        self._report(job, outcome)

    def _expire(self) -> None:
        """Give up the jobs that are past their deadlines."""
        if self.timeout_s is None:
            return
        now = time.monotonic()
        for evaluation, running in list(self._running.items()):
            if not running.has_begun and self.pool.has_begun(running.future):
                running = running._replace(has_begun=True, deadline=now + self._job_s)
                self._running[evaluation] = running
            if running.deadline <= now and not running.future.done():
                self._expired[evaluation] = self._running.pop(evaluation)
                self.pool.expire(running.future)
                grace = f", and {self._grace_s:g} s to compile" if self._grace_s else ""
                error = f"took more than timeout_s {self.timeout_s:g}{grace}"
                self._report(running.job, Outcome("timeout", error=error))

    def _report(self, job: Job, outcome: Outcome) -> None:
        self._is_idle, self._reports = False, self._reports + 1
        self.search.report(job, outcome)
        self._call_back()

    def _call_back(self) -> None:
        self._called_back = self.search.evolution.results
        if self.callback is not None and self.callback(self.search) is True:
            self.stopping.set()


class DriverThread:
    """Run a driver, in the calling thread or in the background."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._thread = threading.Thread(target=self._run, name="nas driver", daemon=True)
        self._error: BaseException | None = None

    @property
    def length(self) -> Length:
        """Return when the search is over."""
        return self._driver.search.length

    @property
    def error(self) -> BaseException | None:
        """Wait for the end and return the error that ended the driver, unless `wait` raised it."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._error

    def run(self) -> None:
        """Run the driver in the calling thread."""
        self._driver.run()

    def start(self) -> None:
        """Run the driver in the background."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._driver.run()
        except BaseException as error:
            self._error = error

    @property
    def is_alive(self) -> bool:
        """Return whether the driver is running in the background."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ask the driver to end soon."""
        self._driver.stopping.set()

    def wait(self, timeout_s: float | None) -> None:
        """Wait for the end, and raise the error that ended the driver, once."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        error, self._error = self._error, None
        if error is not None:
            raise error
