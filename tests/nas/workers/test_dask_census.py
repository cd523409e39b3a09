"""Follow a dask cluster whose workers come and go; they are threads here, which start quickly."""

import threading
import time

import pytest
from searches import Bits, ones

import nas
from nas.errors import WorkersError
from nas.workers import dask, dask_census, driver

distributed = pytest.importorskip("distributed", reason="needs the extra `search`")
OPTIONS = {"space": Bits(), "population": 8, "sample": 3, "cycles": 60, "cache": False}


@pytest.fixture
def cluster(monkeypatch):
    """Return a cluster with one worker, which is counted often."""
    monkeypatch.setattr(dask_census, "COUNT_S", 0.02)
    monkeypatch.setattr(driver, "POLL_S", 0.02)
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False}
    with distributed.LocalCluster(**options, dashboard_address=None) as cluster:
        yield cluster


class Busy:
    """Count the jobs that run at once, in this process."""

    lock, now, at_once = threading.Lock(), 0, []

    def evaluate(self, job: nas.Job) -> float:
        with Busy.lock:
            Busy.now += 1
            Busy.at_once.append(Busy.now)
        time.sleep(0.02)
        with Busy.lock:
            Busy.now -= 1
        return ones(job.architecture)

    def __reduce__(self) -> tuple:
        return Busy, ()


def test_workers_that_join_later_run_jobs_too(tmp_path, cluster) -> None:
    def scale(search) -> None:
        if search.evolution.results == 10:
            cluster.scale(4)
            deadline = time.monotonic() + 20
            while sum(client.nthreads().values()) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)

    Busy.at_once.clear()
    with distributed.Client(cluster) as client:
        options = {"workers": client, "callback": scale, "folder": tmp_path}
        result = nas.search(evaluate=Busy(), **{**OPTIONS, "cycles": 120}, **options)
    assert result.counts.results == 120 and result.counts.failures == 0
    assert max(Busy.at_once[:10]) == 1 and max(Busy.at_once) >= 3


def test_a_cluster_without_workers_ends_the_search_which_resumes(
    tmp_path, cluster, monkeypatch
) -> None:
    def scale(search) -> None:
        if search.evolution.results == 10:
            cluster.scale(0)

    monkeypatch.setattr(driver, "BEGIN_S", 0.3)
    with distributed.Client(cluster) as client:
        options = {"workers": client, "callback": scale, "folder": tmp_path}
        message = r"the dask scheduler .* has had no workers for 0.3 s: start some, then resume the"
        with pytest.raises(WorkersError, match=message):
            nas.search(evaluate=Busy(), **OPTIONS, **options)
        with pytest.raises(WorkersError, match=r"has no workers: start some with `dask worker"):
            dask.pool_of_client(client)
    assert nas.load("search", tmp_path).counts.results >= 10
    result = nas.search(evaluate=Busy(), workers=4, folder=tmp_path, **OPTIONS)
    assert result.counts.results == 60
    nas.replay(result.reader, Bits())


def test_a_scheduler_that_was_started_again_is_told_what_it_needs(cluster) -> None:
    """Have no slots before; a new connection means another scheduler."""

    def introduce() -> None:
        introduced.append(census.count())
        if len(introduced) == 1:
            raise OSError("gone again")
        done.set()

    introduced, done = [], threading.Event()
    with distributed.Client(cluster) as client:
        census = dask_census.Census(client)
        census.on_reconnect = introduce
        assert census.count() == 1
        census._connection = object()
        assert census.count() == 0 and done.wait(20)
        deadline = time.monotonic() + 20
        while not census.count() and time.monotonic() < deadline:
            time.sleep(0.01)
        census.close()
    assert introduced == [0, 0]


class Client:
    """Stand in for a client whose scheduler does not answer."""

    status, scheduler, scheduler_comm = "running", None, object()

    def sync(self, *_: object, **__: object) -> None:
        raise TimeoutError


def test_a_scheduler_that_does_not_answer_has_no_workers() -> None:
    with pytest.raises(WorkersError, match=r"the dask scheduler has no workers: start some with"):
        dask.pool_of_client(Client())
