"""Send a large evaluator to each process once."""

import multiprocessing
import os
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from searches import Bits, ones

import nas
from nas.evaluators.evaluator import as_evaluator
from nas.pickles import sending
from nas.workers import pools, task

DATA = bytes(3_000_000)


class Large:
    """Hold data, and count where it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder, self.data = str(folder), DATA

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        Path(tempfile.mkstemp(dir=self.folder)[1])

    def __call__(self, bits) -> float:
        return ones(bits) + 0.0 * len(self.data)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder that takes a file for each unpickling; temporary files go to another."""
    (tmp_path / "unpickled").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "unpickled"


class Deadly(Large):
    """End the process of the first job."""

    def __call__(self, bits) -> float:
        try:
            Path(self.folder, "died").mkdir()
        except FileExistsError:
            return super().__call__(bits)
        os._exit(1)


def check(folder, workers, kind: type[Large] = Large, deaths: int = 0) -> None:
    result = nas.search(
        space=Bits(), evaluate=kind(folder), folder=folder.parent, population=8, sample=3,
        cycles=20, cache=False, workers=workers,
    )  # fmt: skip
    assert result.counts.evaluations == 20 and result.counts.failures == deaths
    files = [path for path in folder.iterdir() if path.is_file()]
    assert 1 <= len(files) <= 2 + deaths
    assert result.reader.file.stat().st_size < 1_000_000


def test_processes_of_an_executor_read_it_from_a_file(folder) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        check(folder, executor)
    assert not list((folder.parent / "temporary").iterdir())


def test_workers_of_a_cluster_keep_it_and_new_ones_get_it(folder) -> None:
    pytest.importorskip("distributed", reason="needs dask: pip install 'gpipe-jax[search]'")
    check(folder, "processes:1", Deadly, deaths=1)


def test_what_is_sent_with_a_job_is_small(folder) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        pool = pools.of_executor(executor)
        sent = task.make_task(as_evaluator(Large(folder)), pool)
        assert len(pickle.dumps(sent)) < 1000
        small = task.make_task(as_evaluator(sum), pool)
        assert pickle.loads(pickle.dumps(small)).args[0].content is not None
        pool.close()


def test_a_parcel_is_found_by_its_digest() -> None:
    sending.put("a", b"1")
    assert sending.Parcel("a").open() == b"1"
    sending.remove("a")
    with pytest.raises(KeyError):
        sending.Parcel("a").open()
