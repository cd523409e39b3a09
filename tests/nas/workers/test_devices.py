"""Train a candidate on each device; a device that is lost loses no candidate."""

import dataclasses
import threading
import time
from concurrent.futures import CancelledError, Future

import jax
import pytest
from toy import job, search, toy, trace

import nas
from nas.errors import WorkersError
from nas.evaluators.evaluator import Outcome
from nas.training.programs import this_device
from nas.workers import devices, pools


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch) -> None:
    monkeypatch.setattr("nas.training.compilation_cache.use", lambda folder: None)


@pytest.fixture
def three(monkeypatch) -> list:
    """Give this process three devices."""
    devices = jax.local_devices()[1:4]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    return devices


def test_each_device_has_one_candidate_at_a_time(tmp_path, three) -> None:
    def evaluate(genotype) -> float:
        device = this_device()
        assert jax.numpy.ones(3).devices() == {device}
        with lock:
            assert device not in busy
            busy.add(device)
            most.append(len(busy))
        time.sleep(0.02)
        with lock:
            busy.remove(device)
        return str(genotype).count("sep")

    lock, busy, most = threading.Lock(), set(), []
    result = search(tmp_path, evaluate, workers="devices", cycles=30)
    assert max(most) == 3
    assert set(result.evaluations["worker"]) == {"cpu 1", "cpu 2", "cpu 3"}
    assert result.counts.failures == 0


def test_results_do_not_depend_on_the_device(tmp_path, three) -> None:
    random = {"algorithm": "random", "cycles": 9, "evaluate": toy(weight_decay=0.01)}
    many = search(tmp_path, name="many", workers="devices", **random)
    single = search(tmp_path, name="single", **random)
    assert set(many.evaluations["worker"]) == {"cpu 1", "cpu 2", "cpu 3"}
    assert trace(single) == trace(many)
    evaluations = [row for row in many.reader.evaluations() if row.outcome == "ok"]
    compiled = [row.worker for row in evaluations if row.metrics["compile_s"] > 0]
    assert sorted(compiled) == ["cpu 1", "cpu 2", "cpu 3"]


def test_a_device_that_disappears(tmp_path, three, monkeypatch) -> None:
    """Repeat its job elsewhere, and give it no other one."""
    gone = three[1]
    monkeypatch.setattr(devices, "is_responsive", lambda device: device is not gone)

    def evaluate(genotype) -> float:
        if this_device() is gone and next(done) >= 2:
            raise RuntimeError("UNAVAILABLE: the device is in a bad state")
        time.sleep(0.02)
        return str(genotype).count("sep")

    done = iter(range(1000))
    result = search(tmp_path, evaluate, workers="devices", cycles=30)
    assert result.counts.results == 30 and result.counts.failed == 0
    deaths = result.evaluations[result.evaluations["outcome"] == "worker_death"]
    assert len(deaths) == 1
    assert "device cpu 2 no longer responds: RuntimeError: UNAVAILABLE" in deaths["error"].iloc[0]
    assert set(result.evaluations.loc[deaths.index[0] + 3 :, "worker"]) == {"cpu 1", "cpu 3"}


def test_no_device_is_left(tmp_path, three, monkeypatch) -> None:
    monkeypatch.setattr(devices, "is_responsive", lambda device: False)

    def evaluate(genotype) -> float:
        raise RuntimeError("UNAVAILABLE")

    with pytest.raises(RuntimeError, match=r"^no device is left: .*UNAVAILABLE"):
        search(tmp_path, evaluate, workers="devices", cycles=30, max_failures=100)


def test_a_failure_on_a_responsive_device_is_the_candidates() -> None:
    assert devices.is_responsive(jax.local_devices()[2])
    pool = devices.DeviceAllocator(jax.local_devices()[:1]).pool()
    error = Outcome("exception", error="ValueError: mine")
    for _ in range(3):
        assert pool.submit(lambda job: error, job()).result(timeout=60) == error
    pool.close()


def test_a_job_that_hangs_gives_its_device_to_the_next(tmp_path, three, monkeypatch) -> None:
    def evaluate(genotype) -> float:
        if next(count) == 4:
            end.wait(30)
        return str(genotype).count("sep")

    monkeypatch.setattr(jax, "local_devices", lambda: three[:1])
    count, end, begun = iter(range(1000)), threading.Event(), time.monotonic()
    result = search(tmp_path, evaluate, workers="devices", cycles=40, timeout_s=0.3)
    assert time.monotonic() - begun < 20
    end.set()
    assert result.counts.results == 40
    assert result.reader.failures_by_kind() == {"timeout": 1}


def test_a_job_that_waits_for_a_device_has_not_begun() -> None:
    def task(job: nas.Job) -> Outcome:
        return Outcome("ok", float(end.wait(30)))

    pool, end = devices.DeviceAllocator(jax.local_devices()[:1]).pool(), threading.Event()
    first, second = (pool.submit(task, job()) for _ in range(2))
    while not (pool.has_begun(first) or pool.has_begun(second)):
        time.sleep(0.001)
    assert not (pool.has_begun(first) and pool.has_begun(second))
    end.set()
    assert first.result(60) == second.result(60) == Outcome("ok", 1.0) and pool.has_begun(second)
    pool.close()


def test_a_job_that_expires_while_it_waits_does_not_begin() -> None:
    def task(job: nas.Job) -> Outcome:
        began.append(job.candidate)
        return Outcome("ok", float(end.wait(30)))

    pool, end, began = (
        devices.DeviceAllocator(jax.local_devices()[:1]).pool(),
        threading.Event(),
        [],
    )
    first = pool.submit(task, job(0))
    while not pool.has_begun(first):
        time.sleep(0.001)
    second = pool.submit(task, job(1))
    pool.expire(second)
    with pytest.raises(CancelledError):
        second.result(60)
    end.set()
    assert first.result(60).kind == pool.submit(task, job(2)).result(60).kind == "ok"
    assert began == [0, 2]
    pool.close()


def test_a_device_that_fails_and_then_hangs_is_lost(monkeypatch) -> None:
    monkeypatch.setattr(devices, "is_responsive", lambda device: device is not hung or end.wait(30))
    monkeypatch.setattr(devices, "RESPONSE_S", 0.1)
    (hung, other), end = jax.local_devices()[:2], threading.Event()
    pool = devices.DeviceAllocator([hung, other]).pool()

    def task(job: nas.Job) -> Outcome:
        return Outcome("exception", error="UNAVAILABLE")

    kinds = sorted(pool.submit(task, job()).result(20).kind for _ in range(2))
    end.set()
    assert kinds == ["exception", "worker_death"] and pool.count_slots() == 1
    pool.close()


def test_a_default_device_may_be_a_platform() -> None:
    with jax.default_device("cpu"):
        assert this_device() == jax.local_devices()[0]


@pytest.mark.parametrize("handed_out_again", [True, False])
def test_a_device_that_dies_after_a_time_out_is_lost_once(monkeypatch, handed_out_again) -> None:
    """Lose it once even if two jobs fail on it; the other device keeps working."""

    def task(job: nas.Job) -> Outcome:
        end.wait(30)
        return Outcome("exception", error="no") if this_device() is gone else Outcome("ok", 1.0)

    def begin() -> Future:
        future = pool.submit(task, job())
        while not pool.has_begun(future):
            time.sleep(0.001)
        return future

    gone, other = jax.local_devices()[:2]
    monkeypatch.setattr(
        devices, "is_responsive", lambda device: device is not gone or not end.is_set()
    )
    pool, end = devices.DeviceAllocator([gone, other]).pool(), threading.Event()
    dying, well = [begin()], begin()
    pool.expire(dying[0])
    if handed_out_again:
        dying.append(begin())
    end.set()
    assert [future.result(60).kind for future in dying] == ["worker_death"] * len(dying)
    assert [future.result(60).kind for future in (well, begin(), begin())] == ["ok"] * 3
    assert pool.count_slots() == 1
    pool.close()


def test_a_device_that_hangs_is_lost_until_it_responds(tmp_path, three, monkeypatch) -> None:
    def evaluate(genotype) -> float:
        if this_device() is hung:
            end.wait(30)
        time.sleep(0.02)
        return str(genotype).count("sep")

    def answers(device) -> bool:
        return device is not hung or end.wait(30)

    hung, end, pool = three[1], threading.Event(), devices.DeviceAllocator(three).pool()
    monkeypatch.setattr(devices, "is_responsive", answers)
    monkeypatch.setattr(devices, "RESPONSE_S", 0.1)
    options = {"workers": dataclasses.replace(pool, close=lambda: None), "timeout_s": 3.0}
    result = search(tmp_path, evaluate, cycles=60, cache=False, **options)
    assert result.reader.failures_by_kind() == {"timeout": 1} and result.counts.results == 60
    assert pool.count_slots() == 2
    end.set()
    begun = time.monotonic()
    while pool.count_slots() < 3:
        assert time.monotonic() < begun + 20
        time.sleep(0.001)
    pool.close()


def test_each_lost_device_means_one_job_less_at_once(three, monkeypatch) -> None:
    def task(job: nas.Job) -> Outcome:
        return Outcome("exception", error="UNAVAILABLE")

    monkeypatch.setattr(devices, "is_responsive", lambda device: False)
    pool, left = devices.DeviceAllocator(three).pool(), []
    for _ in three:
        assert pool.submit(task, job()).result(60).kind == "worker_death"
        left.append(pool.count_slots())
    assert left == [2, 1, 1]  # so that the next one is submitted
    with pytest.raises(WorkersError, match=r"^no device is left: .*UNAVAILABLE"):
        pool.submit(task, job())
    pool.close()


def test_an_unknown_kind_of_workers() -> None:
    with pytest.raises(ValueError, match="expected a number of threads, 'devices', 'processes'"):
        pools.make_pool("device")


def test_the_only_device_may_be_late(monkeypatch) -> None:
    """Let the next job wait until it responds; the search does not end."""
    began, end = threading.Event(), threading.Event()

    def task(job: nas.Job) -> Outcome:
        began.set()
        return Outcome("ok", 1.0)

    def hang(job: nas.Job) -> Outcome:
        end.wait(30)
        return task(job)

    monkeypatch.setattr(devices, "is_responsive", lambda device: end.wait(30))
    monkeypatch.setattr(devices, "RESPONSE_S", 0.01)
    allocator = devices.DeviceAllocator(jax.local_devices()[:1])
    pool = allocator.pool()
    hung = pool.submit(hang, job())
    while not pool.has_begun(hung):
        time.sleep(0.001)
    pool.expire(hung)
    while not allocator._late:
        time.sleep(0.001)
    waiting = pool.submit(task, job())
    assert not began.wait(0.1)
    end.set()
    assert waiting.result(30).kind == "ok"
    pool.close()
