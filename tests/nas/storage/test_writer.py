"""Write all or nothing, with one writer, and refuse files of other versions and searches."""

import functools
import itertools
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from paths import HELPERS
from searches import Bits, drive, small

import nas
from nas import Job, Search, errors
from nas.errors import MismatchError, SearchInUseError
from nas.storage import local_disk, schema
from nas.storage.reader import Reader
from nas.storage.writer import Store


@pytest.fixture
def path(tmp_path):
    """Return the folder of a finished search."""
    with small(tmp_path) as search:
        drive(search)
    return tmp_path / "search"


def test_a_change_is_written_whole_or_not_at_all(path) -> None:
    store = Store(path)
    before = list(store.events()), store.candidate(3)
    with pytest.raises(ZeroDivisionError), store.change("result", 3):
        store.set_candidate(3, state="failed")
        raise ZeroDivisionError
    assert (list(store.events()), store.candidate(3)) == before
    with store.change("late", 3) as seq:
        pass
    assert seq == before[0][-1].seq + 1
    store.close()


def test_a_second_driver_is_refused_with_the_name_of_the_first(path, tmp_path) -> None:
    code = f"""
import sys; sys.path[:0] = {[str(path) for path in HELPERS]!r}
from searches import small
small({str(tmp_path)!r})
"""
    with small(tmp_path):
        with pytest.raises(
            SearchInUseError, match=r"in use by another driver \(process \d+ on .*\): stop"
        ):
            small(tmp_path)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "SearchInUseError" in other.stderr and other.returncode == 1
        assert len(list(Reader(path).candidates())) == 60  # reading still works
    small(tmp_path).close()


def test_a_second_store_is_refused(path) -> None:
    with pytest.raises(FileExistsError, match="holds a search already: open it, or use another"):
        Store.create(path, name="x", space="bits", settings={})


def test_reading_while_another_writes(tmp_path) -> None:
    """Read counts that only grow, and members and results of the same moment."""
    search = small(tmp_path, cycles=400)
    reader = Reader(tmp_path / "search")
    with ThreadPoolExecutor(1) as pool:
        done, counts = pool.submit(drive, search), []
        while not done.done():
            counts.append(reader.counts().proposed)
            assert len(reader.population()) <= 8
        assert counts == sorted(counts) and done.result().evolution.results == 400
    search.close()


def test_a_network_file_system_is_refused(tmp_path, monkeypatch) -> None:
    mounts = tmp_path / "mounts"
    place = str(tmp_path / "far away").replace(" ", "\\040")
    mounts.write_text(
        f"disk / ext4 rw 0 0\nhost:/x {place} nfs4 rw 0 0\nd {place}/near ext4 rw 0 0\n"
    )
    monkeypatch.setattr(local_disk, "MOUNTS", mounts)
    with pytest.raises(
        OSError, match=r"network file system \(nfs4, mounted at .*far away\), where"
    ):
        small(tmp_path / "far away")
    small(tmp_path / "far away" / "near").close()
    mounts.write_text(f"drive {place} fuse.drive rw 0 0\nx {place}/near fuse.mergerfs rw 0 0\n")
    with pytest.raises(OSError, match=r"\(fuse\.drive, .*give a folder .* and copy that folder"):
        small(tmp_path / "far away")
    small(tmp_path / "far away" / "near").close()
    for kind, refused in (("fuse", True), ("fuseblk", False), ("fuse.sshfs", True)):
        mounts.write_text(f"x {place} {kind} rw 0 0\n")
        if refused:  # a bucket's program may not say its name
            with pytest.raises(OSError, match=rf"network file system \({kind}, mounted at"):
                small(tmp_path / "far away")
        else:
            small(tmp_path / "far away").close()
    small(tmp_path / "local").close()


class CutError(BaseException):
    """End the driver."""


def test_a_driver_killed_while_it_created_the_file_left_nothing(tmp_path, monkeypatch) -> None:
    """End it before each of its statements; the next driver creates the file, or resumes."""

    class Cut(sqlite3.Connection):
        def execute(self, text, *values):
            nonlocal left
            left -= 1
            if left == 0:
                raise CutError(text)
            return super().execute(text, *values)

    connect, cut = sqlite3.connect, []
    for number in itertools.count(1):
        left, folder = number, tmp_path / str(number)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sqlite3, "connect", functools.partial(connect, factory=Cut))
                small(folder).close()
            break
        except CutError as error:
            cut.append(str(error)[:18])
        with small(folder) as search:
            assert search.store.study().name == "search" and search.ask() is not None
    assert {"INSERT INTO study ", "COMMIT", "UPDATE evaluations"} <= set(cut)


def test_the_file_is_complete_while_a_reader_has_it_open(path, tmp_path) -> None:
    reader = Reader(path)
    assert reader.counts().results == 60
    small(tmp_path).close()
    (tmp_path / "copy").mkdir()
    shutil.copy(path / "search.sqlite", tmp_path / "copy")
    assert Reader(tmp_path / "copy").counts().results == 60
    with small(tmp_path, cycles=90) as search:
        drive(search)
    shutil.copy(path / "search.sqlite", tmp_path / "copy")
    assert Reader(tmp_path / "copy").counts().results == 90 == reader.counts().results


def test_a_newer_version_is_refused(path) -> None:
    connection = sqlite3.connect(path / "search.sqlite")
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    for opens in (Reader, Store):
        with pytest.raises(
            errors.StoreVersionError, match=r"has version 3 .* knows up to 2: install a"
        ):
            opens(path)
    with pytest.raises(errors.StoreVersionError):
        Store(path)  # the lock is free again


def test_an_older_version_is_migrated_by_its_driver(path, monkeypatch) -> None:
    monkeypatch.setattr(schema, "VERSION", 4)
    monkeypatch.setattr(
        schema,
        "MIGRATIONS",
        {2: "ALTER TABLE events ADD COLUMN a; ", 3: "ALTER TABLE events DROP COLUMN a;"},
    )
    assert len(list(Reader(path).candidates())) == 60  # readers do not migrate
    store = Store(path)
    assert schema.version(store._connection) == 4 and len(list(store.candidates())) == 60
    store.close()


@pytest.mark.parametrize("policy", ["retrain_warm", "retrain_scratch"])
def test_a_search_of_version_1_is_resumed(tmp_path, policy) -> None:
    """Start pending candidates and retrainings from the newest weights."""

    def begin() -> Search:
        return small(tmp_path, population=1, sample=1, fitness_policy=policy)

    def tell(job: Job) -> None:
        search.tell(job, {"fitness": 1.0, "trained_values": f"values {job.evaluation}"})

    with begin() as search:
        tell(search.ask())
        retrainings = [search.ask() for _ in range(3)]
        tell(retrainings[0])
        connection = search.store._connection
        connection.execute("ALTER TABLE candidates DROP COLUMN inherit")
        older = "detail = json_remove(detail, '$[0][3]')"
        connection.execute(f"UPDATE events SET {older} WHERE kind = 'tournament'")
        connection.execute("PRAGMA user_version = 1")
    assert [row.state for row in Reader(tmp_path / "search").candidates()] == ["done", "open"]
    with begin() as search:
        jobs = [search.ask() for _ in range(3)]
        assert [(job.candidate, job.tournament) for job in jobs] == [(1, None), (0, 2), (0, 3)]
        start = "values 2" if policy == "retrain_warm" else None
        assert [job.inherit for job in jobs] == [start] * 3
        for job in jobs:
            tell(job)
        nas.replay(search.store, Bits())


def test_a_file_that_is_no_database(tmp_path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.sqlite").write_bytes(b"no database, but a text" * 100)
    for opens in (small, lambda folder: Reader(folder / "search")):
        with pytest.raises(
            ValueError, match=r"search\.sqlite is not a search's file, nor any SQ.*: "
        ):
            opens(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no search here"):
        Reader(tmp_path)


def test_another_search_in_the_same_place_is_refused(path, tmp_path) -> None:
    class Longer(Bits):
        name = "longer bits"

    with pytest.raises(MismatchError, match="space is 'bits' in the run, 'longer bits' here; u"):
        small(tmp_path, space=Longer())
    with pytest.raises(MismatchError, match="population is 8 in the run, 9 here; seed is 0 in "):
        small(tmp_path, population=9, seed=1)


def test_a_lineage_begins_with_the_random_ancestor(path) -> None:
    reader = Reader(path)
    last = [row.id for row in reader.candidates()][-1]
    rows = reader.lineage(last)
    assert rows[0].parent is None and rows[-1].id == last and len(rows) > 2
    assert [row.parent for row in rows[1:]] == [row.id for row in rows[:-1]]
    with pytest.raises(KeyError, match="there is no candidate 60 in"):
        reader.candidate(60)


def test_ranking_is_by_fitness_and_then_by_number(tmp_path) -> None:
    for maximise in (True, False):
        with small(tmp_path / str(maximise), maximise=maximise) as search:
            drive(search)
            ranking = [(row.fitness, row.id) for row in search.store.ranked()]
            sign = -1 if maximise else 1
            assert ranking == sorted(ranking, key=lambda pair: (sign * pair[0], pair[1]))
            assert ranking[0][0] >= 9 if maximise else ranking[0][0] <= 3
