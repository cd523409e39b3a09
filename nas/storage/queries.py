"""What reports and pictures show of a run, as numbers: all of it read from the store."""

import math
import re
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nas.storage.reader import CandidateRow, Event, Reader

UNDER_WAY = "under way"
RECENT = 4000  # evaluations that the timeline reaches back
COST_NAMES = (
    r"(^|_)(params|parameters|flops|madds|macs|latency|memory|time|seconds|size|loss|error)(_|$)"
    r"|_(s|ms|us|bytes|kb|mb|gb|kib|mib|gib)$"
)
"""Names of metrics of which less is better, such as `params_m`, `flops`, `latency_ms`, `time_s`."""
NOT_COSTS = ("compile_s", "train_s", "train_loss")
"""Of `nas.TrainingEvaluator`, but no costs of a network: who came first compiles, times depend on
what else the machine does, and the loss is of the training whose accuracy is the fitness."""


class Snapshot(Reader):
    """A search's file as it was at one moment, whatever its driver writes meanwhile."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._connection.execute("BEGIN")
        self.counts()  # the moment is that of the first query


def is_driven(reader: Reader) -> bool:
    """Whether a driver, of any process of this machine, has the search's file open."""
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
    """Entry i of each list is as of the i-th candidate that was given a fitness."""

    candidate: list[int] = field(default_factory=list)
    fitness: list[float] = field(default_factory=list)  # the candidate's own
    best: list[float] = field(default_factory=list)  # of all, then
    evaluations: list[int] = field(default_factory=list)  # that gave candidates theirs, so far


def progress(reader: Reader) -> Progress:
    """How the search came on. With retraining `best` may get worse, as `result.best` may."""
    better = max if reader.study().maximise else min
    found, newest, best = Progress(), {}, None
    for event in reader.events():
        if event.kind not in ("result", "answer", "retrain"):
            continue
        assert event.candidate is not None and event.fitness is not None
        fell = newest.get(event.candidate) == best and event.kind == "retrain"
        newest[event.candidate] = event.fitness
        if fell:
            best = better(newest.values())
        best = event.fitness if best is None else better(best, event.fitness)
        if event.kind == "retrain":
            if found.best:
                found.best[-1] = best
            continue
        found.candidate.append(event.candidate)
        found.fitness.append(event.fitness)
        found.best.append(best)
        made = found.evaluations[-1] if found.evaluations else 0
        found.evaluations.append(made + (event.kind == "result"))
    return found


class PopulationRow(NamedTuple):
    """A member of the population."""

    candidate: int
    age: int  # how many members were trained after it
    fitness: float


def ages(reader: Reader) -> list[PopulationRow]:
    """The population, the youngest first."""
    members = reversed(reader.population())
    return [PopulationRow(row.id, age, row.fitness or 0.0) for age, row in enumerate(members)]


class Bar(NamedTuple):
    """An evaluation in the timeline; times in seconds since the run began, pauses left out."""

    evaluation: int
    worker: str
    outcome: str
    start: float
    end: float


class Timeline(NamedTuple):
    """What the workers did when."""

    bars: list[Bar]
    drivers: list[float]  # when each driver began
    left_out: int  # evaluations before those shown


def timeline(reader: Reader, recent: int = RECENT) -> Timeline:
    """The last evaluations, of each worker; without the time in which no driver was at work.

    Only a report says which worker it came from; those that ended without one are put in as few
    rows as they need, and all that are under way in one.
    """
    last = reader.next_numbers()[1] - 1
    rows = list(reader.evaluations("id > ?", last - recent))
    clock = _Clock(reader.events())
    bars, free = [], []  # `free`: from when on each row without a worker is
    for row in rows:
        start = clock(row.started or row.submitted)
        end = clock(row.finished) if row.finished else clock.end_of_driver(row.submitted)
        worker = UNDER_WAY if row.outcome == "running" else row.worker
        if worker is None:
            k = next((k for k, time in enumerate(free) if time <= start), len(free))
            free[k : k + 1] = [max(start, end)]
            worker = f"unknown {k + 1}"
        bars.append(Bar(row.id, worker, row.outcome, start, max(start, end)))
    return Timeline(bars, clock.starts, last - len(rows))


class _Clock:
    """Seconds for which drivers have been at work, from seconds since 1970."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._began: list[float] = []  # of each driver
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
    """Seconds for which drivers have been at work."""
    return _Clock(reader.events()).end


def top(reader: Reader, count: int) -> list[CandidateRow]:
    """The best candidates of different networks, the best first."""
    found: dict[str, CandidateRow] = {}
    for row in reader.ranked():
        found.setdefault(row.canonical, row)
        if len(found) == count:
            break
    return list(found.values())


def cost_metrics(reader: Reader) -> list[str]:
    """The recorded metrics of which less is better, going by their names; see `COSTS`."""
    for row in reader.candidates("state = 'done'", order="id LIMIT 1"):
        return [n for n in row.metrics if re.search(COST_NAMES, n) and n not in NOT_COSTS]
    return []


def pareto_front(reader: Reader, cost: str) -> Iterator[CandidateRow]:
    """Candidates that no other beats in fitness and cost: the best first, each one cheaper."""
    cheapest = float("inf")
    rows = (
        ((place, row.metrics[cost]), row)
        for place, row in _places(reader)
        if math.isfinite(row.metrics.get(cost, math.nan))
    )
    for _, row in sorted(rows, key=lambda entry: entry[0]):
        if row.metrics[cost] < cheapest:
            cheapest = row.metrics[cost]
            yield row


def _places(reader: Reader) -> Iterator[tuple[int, CandidateRow]]:
    """Candidates with their place by fitness, which those of equal fitness share."""
    place, fitness = -1, None
    for row in reader.ranked():
        if row.fitness != fitness:
            place, fitness = place + 1, row.fitness
        yield place, row
