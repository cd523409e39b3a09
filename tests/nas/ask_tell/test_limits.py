"""Measure limits after the cache, without the lock; their failures are outcomes."""

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from searches import Bits, drive, ones, small, trace

import nas
from nas.ask_tell import limits


class Few(Bits):
    """Have 8 texts and 4 networks."""

    name, length = "few bits", 3


def test_a_network_is_measured_once(tmp_path) -> None:
    def measure(bits) -> float:
        seen[Few().canonical(bits)] += 1
        return ones(bits)

    seen: Counter[str] = Counter()
    limit = nas.Limit("ones", measure, 2)
    for cache in (True, 3):
        seen.clear()
        folder = tmp_path / str(cache)
        with small(folder, space=Few(), cache=cache, limits=[limit]) as search:
            drive(search)
            assert set(seen.values()) == {1} and len(seen) == 4
            counts = search.store.counts()
            assert counts.rejected > 3 and counts.results == 60
            assert counts.proposed == 60 + counts.rejected
            for row in search.store.candidates():
                assert row.metrics == {"ones": row.architecture.count("1")}
            nas.replay(search.store, Few())
    seen.clear()
    with small(tmp_path / "none", space=Few(), cache=False, limits=[limit]) as search:
        drive(search)
        assert sum(seen.values()) == search.store.counts().proposed


def test_measures_change_no_proposal(tmp_path) -> None:
    limit = nas.Limit("ones", ones)
    with small(tmp_path / "a") as plain, small(tmp_path / "b", limits=[limit]) as limited:
        assert trace(drive(plain)) == trace(drive(limited))


def test_others_ask_and_tell_while_a_limit_is_measured(tmp_path) -> None:
    def slow(bits) -> float:
        both.wait(20)  # two at once, else this raises
        return 1.0

    both = threading.Barrier(2)
    with (
        small(tmp_path, limits=[nas.Limit("slow", slow)]) as search,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = [each.result(30) for each in [pool.submit(search.ask) for _ in range(2)]]
        assert {job.candidate for job in jobs} == {0, 1}
        asking = pool.submit(search.ask)
        search.tell(jobs[0], 1.0)  # without waiting for the measure
        assert search.store.candidate(0).fitness == 1.0
        both.wait(20)
        assert asking.result(30).candidate == 2


def test_a_search_that_is_closed_while_a_limit_is_measured(tmp_path) -> None:
    def slow(bits) -> float:
        begun.set()
        end.wait(20)
        return 1.0

    begun, end = threading.Event(), threading.Event()
    search = small(tmp_path, limits=[nas.Limit("slow", slow)])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(search.ask)
        begun.wait(20)
        search.close()
        end.set()
        assert asking.result(20) is None
    with small(tmp_path, limits=[nas.Limit("slow", ones)]) as again:
        assert drive(again).store.counts().results == 60
        nas.replay(again.store, Bits())


def test_a_measure_that_raises_is_a_failure_of_the_candidate(tmp_path) -> None:
    def measure(bits) -> float:
        if bits[:3] == (1, 1, 1):
            raise ValueError("cannot measure")
        return 1.0

    with small(tmp_path, limits=[nas.Limit("size", measure)], max_failures=99) as search:
        drive(search)
        counts = search.store.counts()
        assert counts.results == 60 and counts.failed > 0
        errors = {row.error for row in search.store.evaluations("outcome = 'exception'")}
        assert errors == {"limit 'size': ValueError: cannot measure"}
        assert all(row.attempt <= 2 for row in search.store.evaluations())  # one retry
        nas.replay(search.store, Bits())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"by exception: limit 'size': TypeError: float\(\) argument must be"),
        ("much", r"by exception: limit 'size': ValueError: could not convert"),
        (math.nan, r"by nan: limit 'size': .*nan cannot be compared with at_most 3"),
    ],
)
def test_a_measure_that_always_fails_ends_the_search_and_it_resumes(
    tmp_path, value, message
) -> None:
    given = [value]
    options = {"limits": [nas.Limit("size", lambda bits: given[0], 3)], "max_failures": 4}
    with (
        small(tmp_path, **options) as search,
        pytest.raises(nas.FailuresError, match=f"4 evaluations have failed in a row .*{message}"),
    ):
        search.ask()
    given[0] = 1.0
    with small(tmp_path, **options) as search:
        assert drive(search).store.counts().results == 60
        nas.replay(search.store, Bits())


def test_nan_is_recorded_where_nothing_is_bounded(tmp_path) -> None:
    limit = nas.Limit("latency_ms", lambda bits: math.nan)
    with small(tmp_path, limits=[limit], cycles=8) as search:
        drive(search)
        assert all(math.isnan(row.metrics["latency_ms"]) for row in search.store.candidates())


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (nas.Limit("", sum), TypeError, "limit '': expected a text as the name of its metric"),
        (nas.Limit("size", 3), TypeError, "limit 'size': measure 3 cannot be called; give a"),
        (nas.Limit("size", sum, math.nan), ValueError, "'size': at_most nan must be a number, and"),
        (nas.Limit("size", sum, "3"), ValueError, "'size': at_most '3' must be a number"),
        (nas.Limit("size", sum, None), ValueError, "'size': at_most None must be a number"),
    ],
)
def test_limits_that_are_none(tmp_path, limit, error, message) -> None:
    with pytest.raises(error, match=message):
        small(tmp_path, limits=[limit])
    assert not list(tmp_path.iterdir())


def test_rejections_in_a_row_end_the_search_with_the_last(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_REJECTED", 50)
    message = r"rejected 50 candidates in a row, the last as (ones .* is more than 0|equal to cand)"
    with (
        small(tmp_path, cache=True, limits=[nas.Limit("ones", ones, 0)]) as search,
        pytest.raises(nas.FailuresError, match=message),
    ):
        drive(search)
