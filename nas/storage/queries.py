"""Query a run's store for the numbers that reports and plots show."""

import math
import re
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nas.choices import Direction
from nas.storage.reader import CandidateRow, Event, OpenReader, Reader

RUNNING = "running"
RECENT = 4000  # evaluations in the timeline
COST_NAMES = (
    r"(^|_)(params|parameters|flops|madds|macs|latency|memory|time|seconds|size|loss|error)(_|$)"
    r"|_(s|ms|us|bytes|kb|mb|gb|kib|mib|gib)$"
)
"""Pattern of metrics of which less is better: `params_m`, `flops`, `latency_ms`, `time_s`."""
NOT_COSTS = ("compile_s", "train_s", "train_loss")
"""Metrics of `nas.TrainingEvaluator` that match but are not costs of a network.
The first evaluation compiles, times depend on the load of the machine, and the loss belongs to the
fitness."""


class Snapshot(OpenReader):
    """Read a run's store as it was at one moment, whatever its driver writes meanwhile."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._connection = self._connect()
        self._connection.execute("BEGIN")
        self.counts()  # the first query of the transaction fixes the moment


def is_running(reader: Reader) -> bool:
    """Return whether a driver, in any process of this machine, has the store open."""
    lock = reader.path.with_suffix(".lock")
    if not lock.exists():
        return False
    uri = f"{lock.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=0)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
    except sqlite3.OperationalError as error:
        return "locked" in str(error)
    return False


@dataclass
class Progress:
    """Hold the course of a search: entry i is after the i-th candidate got its fitness."""

    candidate: list[int] = field(default_factory=list)
    fitness: list[float] = field(default_factory=list)  # of that candidate
    best: list[float] = field(default_factory=list)  # of all candidates so far
    evaluations: list[int] = field(default_factory=list)  # with a result, so far


def progress(reader: Reader) -> Progress:
    """Return the course of a search.

    With retraining `best` may get worse, because a new fitness replaces the old one.
    """
    better = max if reader.study().maximise else min
    course, newest, best = Progress(), {}, None
    for event in reader.events():
        if event.kind not in ("result", "answer", "retrain"):
            continue
        assert event.candidate is not None and event.fitness is not None
        was_best = newest.get(event.candidate) == best and event.kind == "retrain"
        newest[event.candidate] = event.fitness
        if was_best:
            best = better(newest.values())
        best = event.fitness if best is None else better(best, event.fitness)
        if event.kind == "retrain":
            if course.best:
                course.best[-1] = best
            continue
        evaluations = course.evaluations[-1] if course.evaluations else 0
        if event.kind == "result":
            evaluations += 1
        course.candidate.append(event.candidate)
        course.fitness.append(event.fitness)
        course.best.append(best)
        course.evaluations.append(evaluations)
    return course


class PopulationRow(NamedTuple):
    """Hold a member of the population with its age."""

    candidate: int
    age: int  # number of members that were trained after it
    fitness: float


def ages(reader: Reader) -> list[PopulationRow]:
    """Return the population, the youngest member first."""
    members = reversed(reader.population())
    return [PopulationRow(row.id, age, row.fitness or 0.0) for age, row in enumerate(members)]


class Bar(NamedTuple):
    """Hold an evaluation in the timeline.

    Times are seconds since the run began, without pauses.
    """

    evaluation: int
    worker: str
    outcome: str
    start: float
    end: float


class Timeline(NamedTuple):
    """Hold what each worker did, and when."""

    bars: list[Bar]
    drivers: list[float]  # start of each driver
    left_out: int  # evaluations before those shown


def timeline(reader: Reader, recent: int = RECENT) -> Timeline:
    """Return the last evaluations by worker, without the time in which no driver was running.

    Evaluations whose outcome names no worker, as after the end of a driver, share rows "unknown 1",
    "unknown 2", ..., as few as hold them without overlap. All running evaluations share one row.
    """
    last = reader.next_numbers()[1] - 1
    rows = list(reader.evaluations("id > ?", last - recent))
    clock = _RunningClock(reader.events())
    bars: list[Bar] = []
    free: list[float] = []  # for each row without a worker, the time from which it is free
    for row in rows:
        start = clock(row.started or row.submitted)
        end = clock(row.finished) if row.finished else clock.end_of_driver(row.submitted)
        worker = RUNNING if row.outcome == "running" else row.worker
        if worker is None:
            k = next((k for k, time in enumerate(free) if time <= start), len(free))
            free[k : k + 1] = [max(start, end)]  # replaces an entry, or appends one
            worker = f"unknown {k + 1}"
        bars.append(Bar(row.id, worker, row.outcome, start, max(start, end)))
    return Timeline(bars, clock.starts, last - len(rows))


class _RunningClock:
    """Convert seconds since 1970 to seconds for which drivers have been running."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._began: list[float] = []  # of each driver, in seconds since 1970
        self.starts: list[float] = []  # the same on this clock
        self.end = 0.0
        for event in events:
            if event.kind == "driver" or not self._began:
                self._began.append(event.at)
                self.starts.append(self.end)
            self.end = max(self.end, self.starts[-1] + event.at - self._began[-1])

    def __call__(self, at: float) -> float:
        k = self._driver(at)
        return min(self.starts[k] + max(0.0, at - self._began[k]), self.end_of_driver(at))

    def end_of_driver(self, at: float) -> float:
        return [*self.starts, self.end][self._driver(at) + 1]

    def _driver(self, at: float) -> int:
        return max(0, bisect_right(self._began, at) - 1)


def work_s(reader: Reader) -> float:
    """Return the seconds for which drivers have been running."""
    return _RunningClock(reader.events()).end


def top(reader: Reader, count: int) -> list[CandidateRow]:
    """Return the best candidates, the best first; of duplicates only the first."""
    best: dict[str, CandidateRow] = {}  # by digest
    for row in reader.ranked():
        best.setdefault(row.canonical, row)
        if len(best) == count:
            break
    return list(best.values())


def front_metrics(reader: Reader) -> dict[str, Direction]:
    """Return the metrics that have a Pareto front, and what is better in each.

    These are the declared ones (`directions` of `nas.search`). If none are declared, they are all
    recorded metrics whose names say that less is better; see `COST_NAMES`.
    """
    declared = reader.study().directions
    if declared is not None:
        return declared
    recorded = dict.fromkeys(
        name for row in reader.candidates("state = 'done'") for name in row.metrics
    )
    names = (n for n in recorded if re.search(COST_NAMES, n) and n not in NOT_COSTS)
    return dict.fromkeys(names, "min")


def pareto_front(
    reader: Reader, metric: str, direction: Direction = "min"
) -> Iterator[CandidateRow]:
    """Yield the candidates that no other beats in both fitness and a metric.

    The best comes first; each one after it is better in the metric. Values that are not finite are
    left out.
    """
    sign, least = 1 if direction == "min" else -1, math.inf
    rows = (
        ((rank, sign * row.metrics[metric]), row)
        for rank, row in _ranks(reader)
        if is_finite(row, metric)
    )
    for (_, value), row in sorted(rows, key=lambda entry: entry[0]):
        if value < least:
            least = value
            yield row


def is_finite(row: CandidateRow, metric: str) -> bool:
    """Return whether both the fitness and a metric of a candidate are finite numbers."""
    return row.fitness is not None and all(
        math.isfinite(value) for value in (row.fitness, row.metrics.get(metric, math.nan))
    )


def _ranks(reader: Reader) -> Iterator[tuple[int, CandidateRow]]:
    """Yield candidates with their rank by fitness; equal fitness has equal rank."""
    rank, fitness = -1, None
    for row in reader.ranked():
        if row.fitness != fitness:
            rank, fitness = rank + 1, row.fitness
        yield rank, row
