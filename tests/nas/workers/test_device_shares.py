"""Let the jobs of a dask worker use all of its devices."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from paths import HELPERS
from searches import Bits

import nas
from nas.workers import device_shares


def test_each_job_has_the_device_with_the_fewest_jobs(monkeypatch) -> None:
    three = jax.local_devices()[1:4]
    monkeypatch.setattr(jax, "local_devices", lambda: three)
    together, names = threading.Barrier(6), []

    def job() -> None:
        with device_shares.shared_by(threads=6) as name:
            names.append(name)
            together.wait(20)
            (device,) = jax.numpy.ones(2).devices()
            assert f"{device.platform} {device.id}" == name

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(job) for _ in range(6)]:
            done.result(20)
    assert sorted(names) == ["cpu 1", "cpu 1", "cpu 2", "cpu 2", "cpu 3", "cpu 3"]
    assert not +device_shares._jobs


def test_a_failed_job_frees_its_device(monkeypatch) -> None:
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    with pytest.raises(ZeroDivisionError), device_shares.least_busy_device():
        raise ZeroDivisionError
    assert not +device_shares._jobs


@pytest.mark.parametrize("threads", [1, 4])
def test_there_is_no_choice(monkeypatch, threads) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [object()])
    with device_shares.shared_by(threads) as name:
        assert name is None


def test_devices_that_another_process_has(monkeypatch) -> None:
    def used() -> list:
        raise RuntimeError("the TPU is already in use by process 7")

    monkeypatch.setattr(jax, "local_devices", used)
    with device_shares.shared_by(threads=4) as name:
        assert name is None


class OfDevice:
    """Return the number of the device that a job's arrays are on."""

    def __init__(self) -> None:
        self.jax = jax  # so that the worker imports it

    def __reduce__(self) -> tuple:
        return OfDevice, ()

    def evaluate(self, job: nas.Job) -> float:
        import time

        time.sleep(0.05)
        (device,) = jax.numpy.ones(2).devices()
        return float(device.id)


@pytest.mark.slow
def test_a_dask_worker_uses_all_of_its_devices(tmp_path, monkeypatch) -> None:
    distributed = pytest.importorskip("distributed", reason="needs dask")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, HELPERS)))
    options = {"population": 8, "sample": 3, "cycles": 30, "cache": False, "folder": tmp_path}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=None) as own,
        distributed.Client(own) as client,
    ):
        result = nas.search(space=Bits(), evaluate=OfDevice(), workers=client, **options)
    assert result.counts.results == 30
    assert set(result.history["fitness"]) == {0.0, 1.0, 2.0}
    names = {name.partition(", ")[2] for name in result.evaluations["worker"]}
    assert names == {"cpu 0", "cpu 1", "cpu 2"}
