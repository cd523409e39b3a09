"""Define the tables of a run's SQLite file and their version, and migrate older files.

    study         one row: what is searched, and with which settings
    candidates    proposal k is row k: architecture, parent, mutation, state, fitness
    evaluations   every attempt to train a candidate: worker, times, outcome
    events        the log, in order; everything else can be rebuilt from it

An event's `seq` is the search's clock. A candidate was proposed from the population after the
events before `proposed`. `last_trained` is the event of its last result. It is a member of the
population until the event `removed`.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nas.errors import NotASearchError, StoreVersionError

VERSION = 2

TABLES = """
CREATE TABLE study (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    name TEXT NOT NULL,
    space TEXT NOT NULL,          -- its name
    settings TEXT NOT NULL,       -- JSON: evolution.Settings, cache, limits, evaluate, code
    created REAL NOT NULL,        -- seconds since 1970, as are all times
    package TEXT NOT NULL,        -- version of gpipe-jax
    setup BLOB                    -- space, evaluator and limits, pickled; NULL if they cannot be
);
CREATE TABLE candidates (
    id INTEGER PRIMARY KEY,
    architecture TEXT NOT NULL,   -- as the space encodes it
    canonical TEXT NOT NULL,      -- digest of its canonical form
    parent INTEGER REFERENCES candidates,
    mutation TEXT,                -- 'kind: details'; NULL if the architecture is random
    state TEXT NOT NULL,          -- open, done, failed, rejected
    proposed INTEGER NOT NULL,    -- event
    fitness REAL,                 -- the newest
    metrics TEXT,                 -- JSON
    answered_by INTEGER REFERENCES candidates,  -- the duplicate whose result or fate it has
    last_trained INTEGER,         -- event
    removed INTEGER,              -- event; NULL while it is a member, or never was
    trained_values TEXT,          -- location of its trained weights
    inherit TEXT                  -- its parent's weights, which it starts from
);
CREATE INDEX members ON candidates (last_trained) WHERE state = 'done' AND removed IS NULL;
CREATE INDEX unfinished ON candidates (id) WHERE state = 'open';
CREATE INDEX twins ON candidates (canonical) WHERE answered_by IS NULL;
CREATE INDEX by_fitness ON candidates (fitness) WHERE state = 'done';
CREATE TABLE evaluations (
    id INTEGER PRIMARY KEY,
    candidate INTEGER NOT NULL REFERENCES candidates,
    tournament INTEGER,           -- if trained again: candidate whose parent it may become
    attempt INTEGER NOT NULL,     -- from 1
    outcome TEXT NOT NULL,        -- running, ok, lost (with its driver), or a kind of failure
    worker TEXT,
    submitted REAL NOT NULL,
    started REAL,
    finished REAL,
    fitness REAL,
    metrics TEXT,                 -- JSON
    error TEXT
);
CREATE INDEX of_candidate ON evaluations (candidate);
CREATE INDEX running ON evaluations (id) WHERE outcome = 'running';
CREATE INDEX of_tournament ON evaluations (tournament) WHERE tournament IS NOT NULL;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,           -- see nas.storage.writer
    candidate INTEGER,
    evaluation INTEGER,
    fitness REAL,
    detail TEXT
);
"""

MIGRATIONS = {
    1: """
    ALTER TABLE candidates ADD COLUMN inherit TEXT;
    UPDATE candidates SET inherit = (
        SELECT trained_values FROM candidates AS parents, study WHERE parents.id = candidates.parent
        AND json_extract(settings, '$.fitness_policy') = 'retrain_warm'
    ) WHERE state = 'open';
    """
}
"""For each version n, the statements that migrate a file to version n + 1."""


def create(connection: sqlite3.Connection, study: Sequence[Any]) -> None:
    """Create the tables and the row of `study` in an empty file: all, or nothing."""
    connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION};")
    connection.execute("INSERT INTO study VALUES (1, ?, ?, ?, ?, ?, ?)", study)
    connection.execute("COMMIT")


@contextmanager
def refusing_other_files(path: object) -> Iterator[None]:
    """Raise NotASearchError with the path if SQLite reports that a file is not a database."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
            raise
        raise NotASearchError(
            f"{path} is not a search's file, nor any SQLite database: give another name or folder, "
            "or move the file away"
        ) from error


def version(connection: sqlite3.Connection) -> int:
    """Return a file's version; 0 if it is empty, as while it is being created."""
    return connection.execute("PRAGMA user_version").fetchone()[0]


def migrate(connection: sqlite3.Connection, path: object) -> None:
    """Migrate a file to `VERSION`, one version at a time."""
    while 0 < (current := version(connection)) < VERSION:
        steps = f"{MIGRATIONS[current]} PRAGMA user_version = {current + 1};"
        connection.executescript(f"BEGIN; {steps} COMMIT;")
    check_version(connection, path)


def check_version(connection: sqlite3.Connection, path: object) -> None:
    """Raise StoreVersionError if a file is newer than this package; older ones can be read.

    Raise NotASearchError if it is not a run's store.
    """
    with refusing_other_files(path):
        current = version(connection)
    if not current:
        raise NotASearchError(f"{path} holds no search: give the name of another run")
    if current > VERSION:
        raise StoreVersionError(
            f"{path} has version {current} of the tables, but this package knows up to {VERSION}: "
            "install a newer gpipe-jax"
        )
