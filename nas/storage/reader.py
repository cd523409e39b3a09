"""Reading a search's file, also while a driver writes to it.

A `Reader` only reads: everything that reports, plots and notebooks show comes from here.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from nas.storage import schema
from nas.storage.old_names import current_evaluator, current_limit

FILE = "search.sqlite"


class Study(NamedTuple):
    """What the search is."""

    name: str
    space: str  # its name
    settings: dict[str, Any]  # of evolution.Settings, and `cache`
    created: float  # seconds since 1970
    package: str
    evaluator: dict[str, Any] | None = (
        None  # see `nas.evaluators.evaluator.goes_by`; not in older files
    )
    limits: list[dict[str, Any]] | None = None  # see `nas.ask_tell.limits.Limit.goes_by`; likewise

    @property
    def maximise(self) -> bool:
        """Whether more is better."""
        return self.settings["maximise"]


class CandidateRow(NamedTuple):
    """A row of the table `candidates`; its comments say what the columns mean."""

    id: int
    architecture: str
    canonical: str
    parent: int | None
    mutation: str | None
    state: str
    proposed: int
    fitness: float | None
    metrics: dict[str, float]
    answered_by: int | None
    last_trained: int | None
    removed: int | None
    trained_values: str | None
    inherit: str | None = None  # no column of files of version 1


class EvaluationRow(NamedTuple):
    """A row of the table `evaluations`."""

    id: int
    candidate: int
    tournament: int | None
    attempt: int
    outcome: str
    worker: str | None
    submitted: float
    started: float | None
    finished: float | None
    fitness: float | None
    metrics: dict[str, float]
    error: str | None


class Event(NamedTuple):
    """A row of the table `events`."""

    seq: int
    at: float
    kind: str
    candidate: int | None
    evaluation: int | None
    fitness: float | None
    detail: str | None


class Counts(NamedTuple):
    """How many of what there are."""

    proposed: int
    results: int  # candidates with a fitness, `cache_hits` of them answered by a twin
    evaluations: int  # that ended well, retrainings too
    cache_hits: int
    rejected: int  # candidates beyond a limit
    failed: int  # candidates given up
    failures: int  # attempts that ended badly, by whatever kind; see `failures_by_kind`
    running: int


class Reader:
    """A search's file, to read from; `path` is the file, or the folder of the run."""

    def __init__(self, path: str | Path) -> None:
        self.path = store_path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: there is no search here (no file {self.path})")
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        self._connection = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
        try:
            schema.check_version(self._connection, self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def study(self) -> Study:
        """What the search is."""
        columns = "name, space, settings, created, package"
        name, space, settings, created, package = self._fetch_one(f"SELECT {columns} FROM study")
        values = json.loads(settings)
        evaluator, limits = values.pop("evaluate", None), values.pop("limits", None)
        if evaluator is not None:
            evaluator = current_evaluator(evaluator)
        if limits is not None:
            limits = [current_limit(limit) for limit in limits]
        return Study(name, space, values, created, package, evaluator, limits)

    def setup(self) -> bytes | None:
        """Space, evaluator and limits, pickled; None if they could not be."""
        return self._fetch_one("SELECT setup FROM study")[0]

    def counts(self) -> Counts:
        """How many candidates and evaluations there are."""
        states = dict(self._rows("SELECT state, COUNT(*) FROM candidates GROUP BY state"))
        outcomes = dict(self._rows("SELECT outcome, COUNT(*) FROM evaluations GROUP BY outcome"))
        hits = self._fetch_one("SELECT COUNT(*) FROM candidates WHERE answered_by IS NOT NULL")[0]
        ended = {kind: n for kind, n in outcomes.items() if kind not in ("running", "lost")}
        return Counts(
            proposed=sum(states.values()),
            results=states.get("done", 0),
            evaluations=ended.pop("ok", 0),
            cache_hits=hits,
            rejected=states.get("rejected", 0),
            failed=states.get("failed", 0),
            failures=sum(ended.values()),
            running=outcomes.get("running", 0),
        )

    def failures_by_kind(self) -> dict[str, int]:
        """How many attempts ended badly, by kind: exception, timeout, nan, ..."""
        query = "SELECT outcome, COUNT(*) FROM evaluations GROUP BY outcome ORDER BY outcome"
        return {kind: n for kind, n in self._rows(query) if kind not in ("running", "lost", "ok")}

    def candidate(self, number: int) -> CandidateRow:
        """One candidate; KeyError if there is none of that number."""
        for row in self.candidates("id = ?", number):
            return row
        raise KeyError(f"there is no candidate {number} in {self.path}")

    def candidates(
        self, where: str = "1", *values: Any, order: str = "id"
    ) -> Iterator[CandidateRow]:
        """Rows of `candidates`, `CandidateRow` each, such as `candidates("state = ?", "done")`."""
        for row in self._rows(f"SELECT * FROM candidates WHERE {where} ORDER BY {order}", *values):
            yield _record(CandidateRow, row)

    def ranked(self) -> Iterator[CandidateRow]:
        """Candidates with a fitness, the best first, and of equals the earlier."""
        direction = "DESC" if self.study().maximise else "ASC"
        return self.candidates("state = 'done'", order=f"fitness {direction}, id")

    def population(self) -> list[CandidateRow]:
        """The members, the one trained least recently first."""
        return list(self.candidates("state = 'done' AND removed IS NULL", order="last_trained"))

    def trained_values(self, others: Iterable[int] = ()) -> set[str]:
        """Where those of the members are, and of other candidates."""
        listed = ",".join(str(int(number)) for number in others)
        columns = "SELECT trained_values FROM candidates WHERE trained_values IS NOT NULL AND"
        members = f"{columns} state = 'done' AND removed IS NULL"
        return {row[0] for row in self._rows(f"{members} UNION {columns} id IN ({listed})")}

    def rivals(self, candidate: int, metric: str) -> tuple[float, ...]:
        """That metric of the members as of the candidate's proposal, where they have it.

        A member that was trained again since then is not among them.
        """
        event = self.candidate(candidate).proposed
        where = "last_trained < ? AND (removed IS NULL OR removed > ?) AND state = 'done'"
        rows = self.candidates(where, event, event)
        return tuple(row.metrics[metric] for row in rows if metric in row.metrics)

    def lineage(self, number: int) -> list[CandidateRow]:
        """A candidate's ancestors from the random one on, and itself last."""
        found = [self.candidate(number)]
        while found[-1].parent is not None:
            found.append(self.candidate(found[-1].parent))
        return found[::-1]

    def evaluations(self, where: str = "1", *values: Any) -> Iterator[EvaluationRow]:
        """Rows of `evaluations` in order, `EvaluationRow` each."""
        for row in self._rows(f"SELECT * FROM evaluations WHERE {where} ORDER BY id", *values):
            yield _record(EvaluationRow, row)

    def attempts(self, candidate: int, tournament: int | None, outcome: str | None = None) -> int:
        """How many evaluations of a candidate there are, for this purpose and of this outcome."""
        query = "SELECT COUNT(*) FROM evaluations WHERE candidate = ? AND tournament IS ?"
        values = (candidate, tournament) if outcome is None else (candidate, tournament, outcome)
        return self._fetch_one(query + " AND outcome = ?" * (outcome is not None), *values)[0]

    def events(self, after: int = 0, most: int = -1) -> Iterator[Event]:
        """Rows of `events` in order, `Event` each: of a greater `seq` than `after`, all, or so many
        at `most`."""
        query = "SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
        for row in self._rows(query, after, most):
            yield Event(*row)

    def next_numbers(self) -> tuple[int, int]:
        """Of the next candidate and of the next evaluation."""
        candidates = "SELECT MAX(id) FROM candidates"
        tournaments = "SELECT MAX(candidate) FROM events WHERE kind = 'tournament'"
        evaluations = "SELECT MAX(id) FROM evaluations"
        last = [self._fetch_one(query)[0] for query in (candidates, tournaments, evaluations)]
        numbers = [-1 if number is None else number for number in last]
        return max(numbers[:2]) + 1, max(numbers[2], 0) + 1

    def open_tournaments(self) -> Iterator[tuple[int, list[list[Any]]]]:
        """Those without a child as yet: its number, and its members as the event has them."""
        where = "kind = 'tournament' AND candidate NOT IN (SELECT id FROM candidates)"
        query = f"SELECT candidate, detail FROM events WHERE {where} ORDER BY seq"
        return ((number, json.loads(detail)) for number, detail in list(self._rows(query)))

    def _rows(self, query: str, *values: Any) -> Iterator[tuple]:
        with closing(self._connection.execute(query, values)) as cursor:
            yield from cursor

    def _fetch_one(self, query: str, *values: Any) -> tuple:
        return next(self._rows(query, *values))


def store_path(path: str | Path) -> Path:
    """The file of a run that is named by its folder or its file."""
    path = Path(path)
    return path if path.suffix == ".sqlite" else path / FILE


def _record(kind: type, row: tuple) -> Any:
    record = kind(*row)
    return record._replace(metrics=json.loads(record.metrics) if record.metrics else {})
