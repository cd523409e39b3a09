"""Write a run's store: SQLite in WAL mode, written by one driver only.

Each change of state is one transaction together with its event. So a driver can be killed at any
time, and the next one resumes from what is written. Kinds of events:

    driver      a driver opened the file; evaluations that were running are lost
    propose     a candidate, from the population after the events before; with `non_aging`,
                `detail` is the sample, of which the worst is removed later
    reject      a candidate is beyond a limit, which `detail` describes, or equal to one that was
                (in older runs this event is the proposal too)
    skip        the space cannot make this proposal, for the reason in `detail`
    tournament  members are to be trained again before this candidate is proposed; `detail` lists
                [candidate, fitness, last_trained, weights to start from] (files of version 1
                without the last)
    start       an evaluation begins
    result      an evaluation gave a candidate its fitness: it joins the population
    answer      a candidate has the fitness of a duplicate: it joins the population
    retrain     an evaluation gave a candidate a new fitness; a member is the youngest then
    failure     an evaluation failed; `detail` is the kind
    fail        a candidate is given up after a failure, or as equal to one that was
    keep        a member keeps its fitness: training it again was given up after a failure
    forget      failures before this event say nothing about networks: duplicates are evaluated
    changed     code of the search differs from that of the results before; `detail` says how
    late        a report of an evaluation that has ended before; it changes nothing
"""

import functools
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from nas.choices import Direction
from nas.errors import LostRunError, SearchExistsError, SearchInUseError
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Proposal
from nas.storage import local_disk, run_folder, schema
from nas.storage.reader import OpenReader, Reader, store_path

CLOSE_MS = 1000  # ms that closing waits for readers
CHECK_S = 0.5  # s between two checks that the file is still there
LOCK_S = 0.2  # s to wait for the lock; `queries.is_running` holds it for less
_PLAIN = (type(None), int, float, str)  # a quick test for most values


class Store(OpenReader):
    """Write a run's store, which belongs to this driver alone until it is closed."""

    def __init__(self, path: str | Path, lock: sqlite3.Connection | None = None) -> None:
        self.path = store_path(path)
        self.file = self.path.absolute()
        self._lock = lock or _lock(self.path)
        self._lost: LostRunError | None = None
        self._next_check, self._is_closed = 0.0, False
        try:
            self._connection = _open(self.path)
        except BaseException:
            self._lock.close()
            raise
        self._file_id = run_folder.file_id(self.file)
        try:
            self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        schema.migrate(self._connection, self.path)
        self._seq = self._fetch_one("SELECT COALESCE(MAX(seq), 0) FROM events")[0]
        with self.change("driver", detail=_this_process()):
            self._connection.execute(
                "UPDATE evaluations SET outcome = 'lost' WHERE outcome = 'running'"
            )

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        name: str,
        space: str,
        settings: dict[str, Any],
        setup: bytes | None = None,
    ) -> "Store":
        """Create the file of a new search, with its folder, and open it.

        A file whose driver was killed while creating it counts as missing.

        Raises:
            SearchExistsError: The file holds a search.
        """
        file = store_path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        local_disk.check_local(file)
        package = metadata.version("gpipe-jax")
        row = (name, space, json.dumps(settings), time.time(), package, setup)
        lock = _lock(file)
        try:
            with closing(_open(file)) as connection:
                if schema.version(connection):
                    raise SearchExistsError(
                        f"{file} holds a search already: open it, or use another"
                    )
                schema.create(connection, row)
        except BaseException:
            lock.close()
            raise
        return cls(file, lock)

    def close(self) -> None:
        """Close the file, so that another driver can open it.

        Everything is in one file then, also while readers have it open, unless one is reading
        at this moment.

        Raises:
            LostRunError: The file is no longer where it was, and no change has raised this yet.
        """
        try:
            if self._lost is None and not self._is_closed:
                self._check_file()
            with suppress(sqlite3.Error):  # closed before, or not a database
                self._connection.execute(f"PRAGMA busy_timeout = {CLOSE_MS}")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self._is_closed = True
            self._connection.close()
            self._lock.close()

    @contextmanager
    def change(
        self,
        kind: str,
        candidate: int | None = None,
        *,
        evaluation: int | None = None,
        fitness: float | None = None,
        detail: str | None = None,
    ) -> Iterator[int]:
        """Run a block as one transaction with its event, and yield the event's `seq`.

        Raises:
            LostRunError: The file is no longer where it was; noticed within `CHECK_S`.
        """
        if (now := time.monotonic()) >= self._next_check:
            self._check_file()
            self._next_check = now + CHECK_S
        seq = self._seq + 1
        row = (seq, time.time(), kind, candidate, evaluation, fitness, detail)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            yield seq
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        self._seq = seq

    def _check_file(self) -> None:
        """Raise LostRunError, the same one each time, unless the file is where it was."""
        if self._lost is None and run_folder.file_id(self.file) != self._file_id:
            self._lost = run_folder.lost_run(self.file, self._connection)
        if self._lost is not None:
            raise self._lost

    # --- rows, within a change --------------------------------------------------------------------

    def add_candidate(self, proposal: Proposal, event: int, **columns: Any) -> None:
        """Add a proposed candidate; columns: architecture, canonical, state, metrics, inherit."""
        self._insert(
            "candidates",
            id=proposal.candidate,
            parent=proposal.parent,
            mutation=proposal.mutation,
            proposed=event,
            **columns,
        )

    def add_evaluation(self, job: Job) -> None:
        """Add an evaluation that begins."""
        self._insert(
            "evaluations",
            id=job.evaluation,
            candidate=job.candidate,
            tournament=job.tournament,
            attempt=job.attempt,
            outcome="running",
            submitted=time.time(),
        )

    def end_evaluation(self, job: Job, outcome: Outcome) -> None:
        """Write the outcome of an evaluation."""
        self._update(
            "evaluations",
            job.evaluation,
            outcome=outcome.kind,
            worker=outcome.worker,
            started=outcome.started,
            finished=outcome.finished or time.time(),
            fitness=outcome.fitness,
            metrics=outcome.metrics,
            error=outcome.error,
        )

    def forget_failures(self) -> int:
        """Write that the failures so far say nothing about networks; return the event."""
        with self.change("forget") as event:
            return event

    def lose_evaluations(self, evaluations: Iterable[int]) -> None:
        """Write that the search no longer waits for these evaluations."""
        for evaluation in evaluations:
            self._update("evaluations", evaluation, outcome="lost")

    def set_candidate(self, candidate: int, **columns: Any) -> None:
        """Change columns of a candidate."""
        self._update("candidates", candidate, **columns)

    def _insert(self, table: str, **columns: Any) -> None:
        values = tuple(map(_to_sql, columns.values()))
        self._connection.execute(_insertion(table, *columns), values)

    def _update(self, table: str, row: int, **columns: Any) -> None:
        values = (*map(_to_sql, columns.values()), row)
        self._connection.execute(_update(table, *columns), values)

    def set_setup(self, setup: bytes | None) -> None:
        """Replace space, evaluator and limits: a resumed search may bring other code."""
        self._connection.execute("UPDATE study SET setup = ?", (setup,))

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        """Replace what identifies evaluator, limits and code; code that is not given stays."""
        code = {**(self.study().code or {}), **identity["code"]}
        for name, value in {**identity, "code": code}.items():
            self._set_setting(name, value)

    def set_directions(self, directions: Mapping[str, Direction]) -> None:
        """Replace what is better in metrics with a Pareto front."""
        self._set_setting("directions", dict(directions))

    def _set_setting(self, name: str, value: Any) -> None:
        settings = {**json.loads(self._fetch_one("SELECT settings FROM study")[0]), name: value}
        self._connection.execute("UPDATE study SET settings = ?", (json.dumps(settings),))


@functools.lru_cache
def _insertion(table: str, *columns: str) -> str:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({names}) VALUES ({marks})"


@functools.lru_cache
def _update(table: str, *columns: str) -> str:
    return f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in columns)} WHERE id = ?"


def _to_sql(value: Any) -> Any:
    """Return a dict as JSON, an empty one as NULL, and any other value as it is."""
    if type(value) in _PLAIN or not isinstance(value, Mapping):
        return value
    return json.dumps(dict(value)) if value else None


def _open(path: Path) -> sqlite3.Connection:
    local_disk.check_local(path)
    connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    try:
        with schema.refusing_other_files(path):
            connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    # Safe if the process is killed. After a power cut the last changes may be missing, in order.
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _lock(path: Path) -> sqlite3.Connection:
    """Open a transaction in a file of its own, which ends with the process in any case.

    Readers of the store are not affected.
    """
    lock = sqlite3.connect(
        path.with_suffix(".lock"), isolation_level=None, timeout=LOCK_S, check_same_thread=False
    )
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise SearchInUseError(
            f"{path} is in use by another driver{_holder(path)}: stop that one first, or read the "
            "run with nas.load"
        ) from error
    return lock


def _holder(path: Path) -> str:
    """Describe the last driver that opened the store, in parentheses."""
    try:
        reader = Reader(path)
        drivers = [event.detail for event in reader.events() if event.kind == "driver"]
        reader.close()
    except (OSError, ValueError, sqlite3.Error):
        return ""
    return f" ({drivers[-1]})" if drivers else ""


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
