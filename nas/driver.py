"""The loop that keeps the workers busy: ask, submit, collect, report; and how it is begun."""

import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nas import evaluate as evaluators
from nas import space as spaces
from nas import workers as pools
from nas.evaluate import Job, Outcome
from nas.limits import Limit
from nas.records import FILE, Reader
from nas.result import Result
from nas.searching import Search
from nas.workers import Pool

Callback = Callable[[Search], object]
POLL_S = 0.5


def search(
    *,
    space: Any,
    evaluate: Any,
    workers: Any = 1,
    wait: bool = True,
    timeout_s: float | None = None,
    time_limit_s: float | None = None,
    callback: Callback | None = None,
    limits: Sequence[Limit] = (),
    name: str = "search",
    folder: str | Path = "runs",
    **options: Any,
) -> Result:
    """Search a space by regularized evolution, in the folder runs/NAME, and return what was found.

    `evaluate` is a function of an architecture that returns its fitness; see `nas.evaluate`.
    `workers` are a number of threads, `processes`, the address of a dask scheduler, or an executor.
    With `wait=False` the search goes on in the background. `timeout_s` is for one evaluation,
    `time_limit_s` for all; `callback(search)` is called after each and ends the search by True.
    The rest goes to `nas.Search`: population, sample, cycles, target, seed, maximise, cache, ...

    A search of the same name and settings goes on where it was. Raises `nas.FailuresError` if the
    evaluator fails too often, and ValueError, or OSError, for what cannot be done at all.
    """
    space, evaluator = spaces.check(space), evaluators.check(evaluate)
    driving = {"workers": workers, "timeout_s": timeout_s}
    setup = Setup(space, evaluate, tuple(limits), {**driving, **options})
    loop = Search(
        space=space, name=name, folder=folder, limits=limits, setup=setup.pickled(), **options
    )
    try:
        pool = pools.pool(workers)
    except BaseException:
        loop.close()
        raise
    running = Running(Driver(loop, evaluator, pool, timeout_s, time_limit_s, callback))
    result = Result(Path(folder) / name, space, running)
    if wait:
        running.run()
        return result.wait()
    running.start()
    return result


def load(name: str | Path, folder: str | Path = "runs") -> Result:
    """The run of that name, or in that folder, as far as it has come; FileNotFoundError if none."""
    path = Path(name) if (Path(name) / FILE).exists() else Path(folder) / name
    if not (path / FILE).exists():
        there = sorted(found.parent.name for found in Path(folder).glob(f"*/{FILE}"))
        known = f"runs in {folder}: {', '.join(there)}" if there else f"there are none in {folder}"
        raise FileNotFoundError(f"no run {str(name)!r}: no file {path / FILE}; {known}")
    return Result(path)


def resume(result: Result, evaluate: Any, options: dict[str, Any]) -> Result:
    """See `Result.resume`."""
    setup = setup_of(result.reader, needed=evaluate is None)
    fixed = [name for name in options if name in result.study.settings or name == "space"]
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: a search cannot be resumed with other ones")
    given = {"limits": setup.limits, **setup.options, **result.study.settings, **options}
    return search(
        space=setup.space if setup.space is not None else result.space,
        evaluate=setup.evaluate if evaluate is None else evaluate,
        name=result.path.name,
        folder=result.path.parent,
        **given,
    )


class Setup(NamedTuple):
    """What a run needs to be resumed, and is not data; pickled, as it is code."""

    space: Any
    evaluate: Any
    limits: tuple[Limit, ...]
    options: dict[str, Any]

    def pickled(self) -> bytes | None:
        """For the store; None if it cannot be."""
        simple = {k: v for k, v in self.options.items() if k != "workers" or type(v) in (int, str)}
        try:
            return pools.dumps(self._replace(options=simple))
        except Exception:  # of any object's own pickling
            return None


def setup_of(reader: Reader, *, needed: bool = True) -> Setup:
    """The run's own setup; ValueError if it is needed and not to be had. Runs what is pickled."""
    blob = reader.setup()
    try:
        if blob is None:
            raise ValueError("they cannot be pickled")
        return pickle.loads(blob)
    except Exception as error:
        if not needed:
            return Setup(None, None, (), {})
        raise ValueError(
            f"{reader.path} does not have the search's functions ({error}): give the evaluator "
            "anew, resume(evaluate=...), or call nas.search as before, with the same name"
        ) from error


class Flight(NamedTuple):
    """A job that is being done."""

    job: Job
    future: Any
    deadline: float  # of time.monotonic


@dataclass
class Driver:
    """Keeps a pool's slots full with a search's jobs, until the search is over."""

    search: Search
    evaluator: evaluators.Evaluator
    pool: Pool
    timeout_s: float | None = None
    time_limit_s: float | None = None
    callback: Callback | None = None

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._task = pools.task(self.evaluator, self.pool.pickles)
        self._done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._flights: dict[int, Flight] = {}
        self._expired: dict[int, Flight] = {}

    def run(self) -> None:
        """To the end of the search; the store and the pool are closed then, whatever ends it."""
        end = time.monotonic() + (self.time_limit_s or float("inf"))
        try:
            while not self.stopping.is_set() and time.monotonic() < end:
                self._fill()
                if not self._flights or self.search.is_over:
                    break
                self._collect(end)
        finally:
            for flight in self._flights.values():
                flight.future.cancel()
            self.search.close()
            self.pool.close()

    def _fill(self) -> None:
        while len(self._flights) < self.pool.slots and (job := self.search.ask()) is not None:
            try:
                future = self.pool.submit(self._task, job)
            except RuntimeError as error:  # such as BrokenProcessPool, or one that is shut down
                raise pools.WorkersError(
                    f"the workers take no more jobs ({error}): use workers='processes', whose "
                    "workers are restarted, and resume the run"
                ) from error
            deadline = time.monotonic() + (self.timeout_s or float("inf"))
            self._flights[job.evaluation] = Flight(job, future, deadline)
            future.add_done_callback(lambda _, number=job.evaluation: self._done.put(number))

    def _collect(self, end: float) -> None:
        """Report what is done, or wait for it a while."""
        self._expire()
        first = min((flight.deadline for flight in self._flights.values()), default=end)
        wait = min(first, end) - time.monotonic()
        try:
            number = self._done.get(timeout=max(0.0, min(wait, POLL_S)))
        except queue.Empty:
            return
        if number in self._flights:
            flight = self._flights.pop(number)
            self._report(flight.job, pools.outcome(flight.future))
        else:
            flight = self._expired.pop(number)
            self.search.report(flight.job, Outcome("timeout"))  # late, and only noted

    def _expire(self) -> None:
        if self.timeout_s is None:
            return
        now = time.monotonic()
        for number, flight in list(self._flights.items()):
            if flight.deadline <= now and not flight.future.done():
                self._expired[number] = self._flights.pop(number)
                self.pool.expire(flight.future)
                text = f"took more than timeout_s {self.timeout_s:g}"
                self._report(flight.job, Outcome("timeout", error=text))

    def _report(self, job: Job, outcome: Outcome) -> None:
        self.search.report(job, outcome)
        if self.callback is not None and self.callback(self.search) is True:
            self.stopping.set()


class Running:
    """A driver at work, perhaps in a thread of its own."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._thread = threading.Thread(target=self._run, name="nas driver", daemon=True)
        self._error: BaseException | None = None

    @property
    def cycles(self) -> int:
        """The number of results at which the search is over."""
        return self._driver.search.cycles

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
