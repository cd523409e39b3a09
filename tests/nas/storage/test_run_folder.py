"""Keep runs in their folders, notice when a folder is gone, and copy it whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from paths import HELPERS
from searches import Bits, drive, ones, small

import nas
from nas import cli
from nas.errors import LostRunError
from nas.storage import writer
from nas.storage.queries import Snapshot
from nas.storage.reader import FILE, Reader
from nas.storage.run_folder import is_name


@pytest.mark.parametrize("name", ["..", ".", "", "/abs", "a/b", "../a", "a/", "a\0b", 3, None])
def test_a_name_that_is_a_path_is_refused(tmp_path, name) -> None:
    options = {"space": Bits(), "folder": tmp_path / "runs", "name": name}
    with pytest.raises(ValueError, match=r"must be the name of one folder.*give .* as `folder`"):
        nas.search(evaluate=ones, **options)
    with pytest.raises(ValueError, match="must be the name of one folder"):
        nas.Search(**options)
    assert not list(tmp_path.iterdir())


def test_other_names_are_legal() -> None:
    assert all(map(is_name, ("first", "with space and ü", "a.b", "...", "-", "~")))


@pytest.mark.parametrize("name", ["..", "../first", "", "/first"])
def test_load_does_not_leave_the_folder_of_runs(tmp_path, monkeypatch, name) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    small(tmp_path).close()
    shutil.copytree(tmp_path / "search", tmp_path / "first")
    with pytest.raises(FileNotFoundError, match=rf"no run '{name}'.*has no searches"):
        nas.load(name, tmp_path / "runs")
    assert nas.load("runs/../first").path.name == "first"  # a path of the run itself


@pytest.mark.parametrize("workdir", [".", "sub/.."])
def test_a_folder_without_a_name_of_its_own_is_resolved(tmp_path, monkeypatch, workdir) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    (tmp_path / "mine" / "ev.py").write_text("evaluate = sum\n")
    (tmp_path / "mine" / "sub").mkdir()
    (tmp_path / "mine" / "c.yaml").write_text(
        "space: {kind: nasbench201}\n"
        "evaluate: {kind: function, function: ev:evaluate}\n"
        "evolution: {population: 2, sample: 2}\n"
        f"run: {{cycles: 3, workdir: {workdir}}}\n"
    )
    assert cli.main(["search", "c.yaml"]) == 0
    assert nas.load(tmp_path / "mine").study.name == "mine"


def slow_ones(bits) -> float:
    """Return the fitness after a while."""
    time.sleep(0.005)
    return ones(bits)


def start_in_background(folder) -> nas.Result:
    """Return a search that has some results and is running."""
    result = nas.search(
        space=Bits(), evaluate=slow_ones, folder=folder, population=8, sample=3, cycles=2000,
        wait=False,
    )  # fmt: skip
    while result.counts.results < 10:
        time.sleep(0.01)
    return result


@pytest.mark.parametrize("what", ["removed", "moved", "replaced"])
def test_a_folder_that_is_gone_ends_the_search_with_a_copy(tmp_path, monkeypatch, what) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    result = start_in_background(tmp_path / "runs")
    (tmp_path / "runs" / "search").rename(tmp_path / "aside")
    if what == "replaced":
        small(tmp_path / "runs").close()
    if what == "removed":
        shutil.rmtree(tmp_path / "aside")
    with pytest.raises(LostRunError, match=r"runs/search was .* running; its results .* are in"):
        result.wait()
    assert result.path.is_relative_to(tmp_path / "temporary") and result.counts.results >= 10
    nas.replay(result.reader, Bits())
    finished = nas.load(result.path).resume(cycles=result.counts.results + 5)
    assert finished.counts.results >= 15


def test_a_folder_that_is_gone_is_noticed_by_ask_and_tell(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "CHECK_S", 0.0)
    search = small(tmp_path)
    search.tell(search.ask(), 1.0)
    job = search.ask()
    shutil.rmtree(tmp_path / "search")
    for _ in range(2):
        with pytest.raises(LostRunError) as caught:
            search.tell(job, 1.0)
    search.close()
    assert nas.load(caught.value.copy).counts.results == 1
    shutil.rmtree(Path(caught.value.copy).parent)


@pytest.mark.parametrize("what", ["removed", "moved"])
def test_a_folder_that_is_gone_at_the_end_loses_no_result(tmp_path, what) -> None:
    search = small(tmp_path)
    search.tell(search.ask(), 1.0)
    (tmp_path / "search").rename(tmp_path / "aside")
    if what == "removed":
        shutil.rmtree(tmp_path / "aside")
    search.tell(search.ask(), 1.0)  # within `CHECK_S` of the last check
    with pytest.raises(LostRunError) as caught:
        search.close()
    search.close()
    assert nas.load(caught.value.copy).counts.results == 2
    shutil.rmtree(Path(caught.value.copy).parent)


def test_a_search_whose_folder_goes_with_its_last_result_says_so(tmp_path) -> None:
    def evaluate(bits) -> float:
        if len(done) == 19:
            shutil.rmtree(tmp_path / "search")
        done.append(bits)
        return ones(bits)

    done: list = []
    options = {"population": 8, "sample": 3, "cycles": 20, "cache": False, "folder": tmp_path}
    with pytest.raises(LostRunError) as caught:
        nas.search(space=Bits(), evaluate=evaluate, **options)
    assert nas.load(caught.value.copy).counts.results == 20
    shutil.rmtree(Path(caught.value.copy).parent)


def test_another_working_folder_is_no_loss(tmp_path, monkeypatch) -> None:
    """Change the working folder while a search with a relative folder runs."""
    monkeypatch.chdir(tmp_path)

    def evaluate(bits) -> float:
        (tmp_path / "other").mkdir(exist_ok=True)
        os.chdir(tmp_path / "other")
        return ones(bits)

    result = nas.search(space=Bits(), evaluate=evaluate, population=8, sample=3, cycles=20)
    assert result.counts.results == 20


# --- copies ---------------------------------------------------------------------------------------

DRIVER = """
import sys, time
sys.path[:0] = {tests!r}
import nas
from searches import Bits, ones

def evaluate(bits):
    time.sleep(0.002)
    return ones(bits)

nas.search(space=Bits(), evaluate=evaluate, folder={folder!r}, population=8, sample=3, cycles=9999)
"""


def test_a_copy_has_the_results_of_a_driver_that_was_killed(tmp_path) -> None:
    """Copy more than search.sqlite, which lacks what SQLite has not moved into it."""
    code = DRIVER.format(tests=[str(path) for path in HELPERS], folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "search" / FILE).exists() or _results(tmp_path / "search") < 30:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = nas.load("search", tmp_path)
    copy = result.copy_to(tmp_path / "copy")
    assert copy.counts.results == result.counts.results >= 30
    assert not (tmp_path / "copy" / "search.lock").exists()
    nas.replay(copy.reader, Bits())


def _results(folder) -> int:
    try:
        return Reader(folder).counts().results
    except Exception:  # it is not complete yet
        return 0


def test_a_copy_of_a_running_search_has_all_files_and_resumes(tmp_path) -> None:
    running = start_in_background(tmp_path)
    (tmp_path / "search" / "weights").mkdir()
    (tmp_path / "search" / "weights" / "notes.txt").write_text("mine")
    copy = running.copy_to(tmp_path / "deep" / "copy")
    running.stop()
    assert (tmp_path / "deep" / "copy" / "weights" / "notes.txt").read_text() == "mine"
    nas.replay(copy.reader, Bits())
    count = copy.counts.results
    assert 10 <= count <= running.counts.results
    assert copy.resume(cycles=count + 5).counts.results == count + 5
    with pytest.raises(FileExistsError, match="copy exists already: give another folder"):
        running.copy_to(tmp_path / "deep" / "copy")


# --- open files -----------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_copy_that_would_lack_a_file_is_an_error(tmp_path, monkeypatch) -> None:
    result = nas.search(space=Bits(), evaluate=ones, cycles=6, population=2, folder=tmp_path)
    (result.path / "weights").mkdir()
    for name in ("gone", "large"):
        (result.path / "weights" / name).write_text("1")

    def copy2(source, target) -> None:
        error = FileNotFoundError if Path(source).name == "gone" else OSError
        raise error(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", copy2)
    with pytest.raises(OSError, match=r"large.*No space left on device") as caught:
        result.copy_to(tmp_path / "copy")
    assert "gone" not in str(caught.value)


def test_a_run_is_not_copied_into_itself(tmp_path) -> None:
    result = nas.search(space=Bits(), evaluate=ones, cycles=6, population=2, folder=tmp_path)
    with pytest.raises(ValueError, match="is in the run's folder itself: give another folder"):
        result.copy_to(result.path / "copy")
    assert not (result.path / "copy").exists()


def test_a_run_in_a_folder_that_takes_no_files_is_read(tmp_path, monkeypatch) -> None:
    """Read a colleague's run, beside which SQLite cannot write."""
    path = nas.search(space=Bits(), evaluate=ones, cycles=6, population=2, folder=tmp_path).path
    files = sorted(path.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with closing(Snapshot(path)) as snapshot:
        assert snapshot.counts().results == 6
        assert sorted(path.iterdir()) == files


def test_runs_that_were_loaded_keep_no_file_open(tmp_path) -> None:
    with small(tmp_path) as search:
        drive(search)
    before = len(os.listdir("/proc/self/fd"))
    results = [nas.load("search", tmp_path) for _ in range(20)]
    assert all(result.counts.results == 60 for result in results)
    assert len(os.listdir("/proc/self/fd")) == before
