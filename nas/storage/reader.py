"""Read a run's store, also while a driver writes to it.

A `Reader` never writes. Everything that reports, plots and notebooks show comes from here.
"""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nas.choices import Direction
from nas.storage import run_folder, schema
from nas.storage.old_names import current_evaluator, current_limit

FILE = "search.sqlite"


class Study(NamedTuple):
    """Describe the search: the row of the table `study`."""

    name: str
    space: str  # its name
    settings: dict[str, Any]  # of evolution.Settings, and `cache`
    created: float  # seconds since 1970
    package: str
    evaluator: dict[str, Any] | None = None  # `identity_of` it; older files do not have it
    limits: list[dict[str, Any]] | None = None  # `identity` of each; likewise
    directions: dict[str, Direction] | None = None  # of metrics with a Pareto front, if declared
    code: dict[str, Any] | None = None  # fingerprints of what it runs; older files have none

    @property
    def maximise(self) -> bool:
        """Return whether a larger fitness is better."""
        return self.settings["maximise"]


class CandidateRow(NamedTuple):
    """Hold a row of the table `candidates`; `nas.storage.schema` explains the columns."""

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
    inherit: str | None = None  # files of version 1 do not have this column


class EvaluationRow(NamedTuple):
    """Hold a row of the table `evaluations`."""

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
    """Hold a row of the table `events`."""

    seq: int
    at: float
    kind: str
    candidate: int | None
    evaluation: int | None
    fitness: float | None
    detail: str | None


class Counts(NamedTuple):
    """Count candidates and evaluations."""

    proposed: int  # candidates
    results: int  # candidates with a fitness
    evaluations: int  # successful ones, with retrainings
    cache_hits: int  # candidates with a fitness that is of a duplicate
    rejected: int  # candidates beyond a limit, or equal to one that was
    failed: int  # candidates given up, or equal to one that was
    failures: int  # failed evaluations of any kind; see `failures_by_kind`
    running: int  # evaluations


class Reader:
    """Read a run's store; `path` is the file or the run's folder.

    The file is open only during a query, so any number of readers may exist, in any thread.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = store_path(path)
        self.file = self.path.absolute()  # also after a change of the working folder
        with closing(self._connect()) as connection:
            schema.check_version(connection, self.path)

    def _connect(self) -> sqlite3.Connection:
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.path.parent}: there is no search here (no file {self.path})"
            )
        uri = f"{self.file.as_uri()}?mode=ro"
        has_log = Path(f"{self.file}-wal").exists()
        if not has_log and not os.access(self.file.parent, os.W_OK):
            uri += "&immutable=1"  # SQLite would have to make a log, and this folder takes none
        return sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection for one query."""
        with closing(self._connect()) as connection:
            yield connection

    def close(self) -> None:
        """Close the file, which is not open between queries."""

    def copy_run_to(self, folder: Path) -> None:
        """Copy the run's folder, with the store as of this moment, while a driver may write to it.

        Raises:
            FileExistsError: The folder exists.
            ValueError: It is in the run's folder.
        """
        if self.file.parent.resolve() in folder.resolve().parents:
            raise ValueError(f"{folder} is in the run's folder itself: give another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise FileExistsError(f"{folder} exists already: give another folder") from error
        # A run counts as there when it has a store: hence the store comes last.
        run_folder.copy_other_files(self.file, folder)
        with self._connected() as connection, closing(sqlite3.connect(folder / FILE)) as copy:
            connection.backup(copy)

    def study(self) -> Study:
        """Return what the search is."""
        columns = "name, space, settings, created, package"
        name, space, settings, created, package = self._fetch_one(f"SELECT {columns} FROM study")
        values = json.loads(settings)
        evaluator, limits = values.pop("evaluate", None), values.pop("limits", None)
        if evaluator is not None:
            evaluator = current_evaluator(evaluator)
        if limits is not None:
            limits = [current_limit(limit) for limit in limits]
        directions, code = values.pop("directions", None), values.pop("code", None)
        return Study(name, space, values, created, package, evaluator, limits, directions, code)

    def setup(self) -> bytes | None:
        """Return space, evaluator and limits, pickled; None if they could not be pickled."""
        return self._fetch_one("SELECT setup FROM study")[0]

    def counts(self) -> Counts:
        """Count candidates and evaluations."""
        states = dict(self._rows("SELECT state, COUNT(*) FROM candidates GROUP BY state"))
        outcomes = dict(self._rows("SELECT outcome, COUNT(*) FROM evaluations GROUP BY outcome"))
        query = "SELECT COUNT(*) FROM candidates WHERE answered_by IS NOT NULL AND state = 'done'"
        hits = self._fetch_one(query)[0]
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
        """Count failed evaluations by kind: exception, timeout, nan, ..."""
        query = "SELECT outcome, COUNT(*) FROM evaluations GROUP BY outcome ORDER BY outcome"
        return {kind: n for kind, n in self._rows(query) if kind not in ("running", "lost", "ok")}

    def candidate(self, number: int) -> CandidateRow:
        """Return a candidate; raise KeyError if there is none of that number."""
        for row in self.candidates("id = ?", number):
            return row
        last = self.next_numbers()[0] - 1
        known = f"give a number from 0 to {last}" if last >= 0 else "it has none yet"
        raise KeyError(f"there is no candidate {number} in {self.path}: {known}")

    def candidates(
        self, where: str = "1", *values: Any, order: str = "id"
    ) -> Iterator[CandidateRow]:
        """Yield candidates under an SQL condition, such as `candidates("state = ?", "done")`."""
        for row in self._rows(f"SELECT * FROM candidates WHERE {where} ORDER BY {order}", *values):
            yield _record(CandidateRow, row)

    def ranked(self) -> Iterator[CandidateRow]:
        """Yield candidates with a fitness, the best first, and of equals the earlier first."""
        direction = "DESC" if self.study().maximise else "ASC"
        return self.candidates("state = 'done'", order=f"fitness {direction}, id")

    def population(self) -> list[CandidateRow]:
        """Return the members, the one trained least recently first."""
        return list(self.candidates("state = 'done' AND removed IS NULL", order="last_trained"))

    def trained_values(self, others: Iterable[int] = ()) -> set[str]:
        """Return the locations of the trained weights of the members and of other candidates."""
        listed = ",".join(str(int(number)) for number in others)
        columns = "SELECT trained_values FROM candidates WHERE trained_values IS NOT NULL AND"
        members = f"{columns} state = 'done' AND removed IS NULL"
        return {row[0] for row in self._rows(f"{members} UNION {columns} id IN ({listed})")}

    def rivals(self, candidate: int, metric: str) -> tuple[float, ...]:
        """Return a metric of the members at the candidate's proposal, if they have it.

        A member that was trained again since then is not among them.
        """
        event = self.candidate(candidate).proposed
        where = "last_trained < ? AND (removed IS NULL OR removed > ?) AND state = 'done'"
        rows = self.candidates(where, event, event)
        return tuple(row.metrics[metric] for row in rows if metric in row.metrics)

    def lineage(self, number: int) -> list[CandidateRow]:
        """Return a candidate's ancestors, the random one first, and itself last."""
        rows = [self.candidate(number)]
        while rows[-1].parent is not None:
            rows.append(self.candidate(rows[-1].parent))
        return rows[::-1]

    def evaluations(self, where: str = "1", *values: Any) -> Iterator[EvaluationRow]:
        """Yield evaluations under an SQL condition, by number."""
        for row in self._rows(f"SELECT * FROM evaluations WHERE {where} ORDER BY id", *values):
            yield _record(EvaluationRow, row)

    def attempts(self, candidate: int, tournament: int | None, outcome: str | None = None) -> int:
        """Count the evaluations of a candidate for a tournament, or for none.

        With `outcome`, count only those that ended so.
        """
        query = "SELECT COUNT(*) FROM evaluations WHERE candidate = ? AND tournament IS ?"
        if outcome is None:
            return self._fetch_one(query, candidate, tournament)[0]
        return self._fetch_one(f"{query} AND outcome = ?", candidate, tournament, outcome)[0]

    def events(self, after: int = 0, limit: int = -1) -> Iterator[Event]:
        """Yield events in order: those with a `seq` greater than `after`, at most `limit`."""
        query = "SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?"  # -1: no limit
        for row in self._rows(query, after, limit):
            yield Event(*row)

    def next_numbers(self) -> tuple[int, int]:
        """Return the numbers of the next candidate and of the next evaluation."""
        candidates = "SELECT MAX(id) FROM candidates"
        tournaments = "SELECT MAX(candidate) FROM events WHERE kind IN ('tournament', 'skip')"
        evaluations = "SELECT MAX(id) FROM evaluations"
        last = [self._fetch_one(query)[0] for query in (candidates, tournaments, evaluations)]
        numbers = [-1 if number is None else number for number in last]
        return max(numbers[:2]) + 1, max(numbers[2], 0) + 1

    def open_tournaments(self) -> Iterator[tuple[int, list[list[Any]]]]:
        """Yield tournaments without a child: the child's number, and the event's members."""
        skipped = "SELECT candidate FROM events WHERE kind = 'skip'"
        ended = f"SELECT id FROM candidates UNION {skipped}"
        where = f"kind = 'tournament' AND candidate NOT IN ({ended})"
        query = f"SELECT candidate, detail FROM events WHERE {where} ORDER BY seq"
        return ((number, json.loads(detail)) for number, detail in list(self._rows(query)))

    def kept_members(self, tournament: int) -> list[int]:
        """Return the members of a tournament whose retraining was given up."""
        query = (
            "SELECT evaluations.candidate FROM evaluations JOIN events "
            "ON events.evaluation = evaluations.id AND events.kind = 'keep' WHERE tournament = ?"
        )
        return [candidate for (candidate,) in self._rows(query, tournament)]

    def skips(self) -> tuple[int, str]:
        """Return the number of proposals that the space could not make, and the last reason."""
        # By SQLite's rule `detail` is that of the row with the maximum.
        query = "SELECT COUNT(*), COALESCE(detail, ''), MAX(seq) FROM events WHERE kind = 'skip'"
        return self._fetch_one(query)[:2]

    def last_event(self, kind: str) -> int:
        """Return the `seq` of the last event of a kind; 0 if there is none."""
        return self._fetch_one("SELECT COALESCE(MAX(seq), 0) FROM events WHERE kind = ?", kind)[0]

    def _rows(self, query: str, *values: Any) -> Iterator[tuple]:
        with self._connected() as connection, closing(connection.execute(query, values)) as cursor:
            yield from cursor

    def _fetch_one(self, query: str, *values: Any) -> tuple:
        return next(self._rows(query, *values))


class OpenReader(Reader):
    """Keep the file open between queries; the connection is for one thread at a time."""

    _connection: sqlite3.Connection

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        yield self._connection

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def store_path(path: str | Path) -> Path:
    """Return the file of a run that is given by its folder or its file."""
    path = Path(path)
    return path if path.suffix == ".sqlite" else path / FILE


def _record(kind: type, row: tuple) -> Any:
    record = kind(*row)
    return record._replace(metrics=json.loads(record.metrics) if record.metrics else {})
