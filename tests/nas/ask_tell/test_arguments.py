"""Arguments of a search: defaults that depend on each other, and what is refused at the start."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from searches import Bits, drive, ones, small

import nas
from nas.evaluators.evaluator import Outcome
from nas.evolution.length import length
from nas.storage.reader import Reader


def search(folder, **options) -> nas.Result:
    return nas.search(space=Bits(), evaluate=ones, folder=folder, **options)


# --- the population of a short search -------------------------------------------------------------


def test_a_short_search_has_a_population_that_fits(tmp_path) -> None:
    result = search(tmp_path, cycles=50)
    settings = result.study.settings
    assert (settings["population"], settings["sample"]) == (25, 6)
    assert result.counts.results == 50 and len(result.population) == 25
    assert any(row.parent is not None for row in result.reader.candidates())


@pytest.mark.parametrize(
    ("given", "population", "sample"),
    [
        ({"cycles": 100}, 100, 25),
        ({"cycles": 99}, 49, 12),
        ({"cycles": 1}, 1, 1),
        ({"evaluations": 40}, 20, 5),
        ({"cycles": 50, "sample": 9}, 25, 9),
        ({"cycles": 50, "population": 30}, 30, 25),
        ({"cycles": 50, "population": None, "sample": None}, 25, 6),
        ({"cycles": 50, "algorithm": "random"}, 100, 25),
    ],
)
def test_defaults_of_population_and_sample(tmp_path, given, population, sample) -> None:
    with nas.Search(space=Bits(), folder=tmp_path, **given) as loop:
        assert (loop.settings.population, loop.settings.sample) == (population, sample)


def test_a_longer_search_keeps_the_population_of_its_run(tmp_path) -> None:
    search(tmp_path, cycles=50)
    result = search(tmp_path, cycles=150)
    assert result.counts.results == 150 and len(result.population) == 25
    with pytest.raises(nas.errors.MismatchError, match="population is 25 in the run, 100 here"):
        search(tmp_path, cycles=200, population=100)


@pytest.mark.parametrize("name", ["cycles", "evaluations"])
def test_a_population_that_is_given_must_fit(tmp_path, name) -> None:
    rule = f"{name} 7 is less than population 8: evolution begins .* give more {name}, or a smaller"
    with pytest.raises(ValueError, match=rule):
        search(tmp_path, population=8, **{name: 7})
    assert not list(tmp_path.iterdir())


# --- a budget of evaluations ----------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 7])
def test_a_search_ends_at_its_budget_of_evaluations(tmp_path, slots) -> None:
    started: list[int] = []

    def evaluate(job: nas.Job) -> float:
        started.append(job.candidate)
        return ones(job.architecture)

    with small(tmp_path, cache=True, cycles=1000, evaluations=40) as loop:
        drive(loop, evaluate, slots)
        counts = loop.store.counts()
    assert len(started) == counts.evaluations == 40 and counts.cache_hits > 0
    assert counts.results == 40 + counts.cache_hits


def test_failures_are_outside_the_budget(tmp_path) -> None:
    def evaluate(job: nas.Job) -> float:
        return math.nan if job.candidate % 4 == 0 else ones(job.architecture)

    with small(tmp_path, evaluations=30) as loop:
        drive(loop, evaluate, slots=5)
        counts = loop.store.counts()
    assert counts.evaluations == 30 and counts.failures >= 8


def test_retrainings_are_within_the_budget(tmp_path) -> None:
    with small(tmp_path, evaluations=50, fitness_policy="retrain_scratch") as loop:
        drive(loop, slots=4)
        counts = loop.store.counts()
    assert counts.evaluations == 50 and counts.results < 30


def test_a_budget_holds_while_limits_are_measured(tmp_path) -> None:
    """Ask from several threads, all of which pass the budget before one of them starts a job."""

    def measure(bits) -> float:
        barrier.wait(5)
        return 1.0

    barrier = threading.Barrier(4)
    limits = [nas.Limit("slow", measure)]
    with (
        small(tmp_path, population=1, cycles=4, evaluations=1, limits=limits) as loop,
        ThreadPoolExecutor(4) as pool,
    ):
        jobs = [asked.result() for asked in [pool.submit(loop.ask) for _ in range(4)]]
    assert sum(job is not None for job in jobs) == 1


def test_a_budget_is_resumed_and_may_grow(tmp_path) -> None:
    result = search(tmp_path, evaluations=30)
    assert result.counts.evaluations == 30
    assert search(tmp_path, evaluations=30).counts.proposed == result.counts.proposed
    result = nas.load("search", tmp_path).resume(evaluations=45)
    assert result.counts.evaluations == 45
    nas.replay(result.reader, Bits())


def test_a_small_space_ends_a_search_with_a_budget(tmp_path) -> None:
    """Let the cache answer all proposals, as the space has no more networks."""

    class Tiny(Bits):
        name, length = "tiny", 2

    with nas.Search(space=Tiny(), folder=tmp_path, evaluations=10) as loop:
        drive(loop)
        counts = loop.store.counts()
    assert (counts.results, counts.evaluations) == (100, 3)


# --- what is refused at the start -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cycles": 0}, "`cycles` must be a whole number of at least 1, got 0"),
        ({"evaluations": 2.5}, "`evaluations` must be a whole number of at least 1, got 2.5"),
        ({"cache": -1}, "cache -1: expected True, False, or how many times"),
        ({"cache": "no"}, "cache 'no': expected True, False, or how many times"),
        ({"max_failures": 0}, "`max_failures` must be a whole number of at least 1, got 0"),
        ({"target": "9"}, "target '9': expected a number, not NaN, or None"),
        ({"retries": {"nan": 1}}, "retries {'nan': 1}: expected nas.Retries, such as"),
        ({"compare": 3}, "compare 3: expected the name of a metric, or None"),
        ({"callback": 3}, "callback 3 cannot be called; give a function of a nas.Search"),
        ({"limits": None}, "limits: expected a list of nas.Limit, got None; give for example"),
        ({"limits": nas.Limit("m", sum)}, "limits: expected a list of nas.Limit, got Limit(name="),
        ({"limits": [("m", sum)]}, "limits: expected a list of nas.Limit, got ('m', "),
        ({"limits": [nas.Limit("fitness", sum)]}, "limits: 'fitness' cannot be the name of a limi"),
        ({"limits": [nas.Limit("m", sum)] * 2}, "limits: 2 of them have the name 'm', and one"),
        ({"directions": ["latency"]}, "directions: expected the names of metrics, each with min o"),
        ({"directions": {"a": "mn"}}, "directions: 'mn' of 'a' is unknown; did you mean 'min'?"),
        ({"directions": {"fitness": "min"}}, "directions: 'fitness' is not another metric"),
    ],
)
def test_an_illegal_argument_is_refused_before_anything_is_written(
    tmp_path, options, problem
) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(problem)):
        search(tmp_path, **{"population": 4, "sample": 2, "cycles": 8, **options})
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_legal(tmp_path) -> None:
    options = {
        "population": np.int64(4), "sample": np.int64(2), "cycles": np.int64(10),
        "evaluations": np.int64(9), "seed": np.int64(1), "workers": np.int64(1),
        "target": np.float32(99), "timeout_s": np.float64(5), "time_limit_s": np.int64(20),
        "max_failures": np.int64(3), "cache": np.bool_(False), "maximise": np.bool_(True),
        "replacement": np.bool_(True),
    }  # fmt: skip
    result = search(tmp_path, **options)
    assert result.counts.evaluations == 9
    assert result.resume(evaluations=10).counts.evaluations == 10


@pytest.fixture
def asked(tmp_path):
    """Return a search with a running job."""
    with small(tmp_path) as loop:
        yield loop, loop.ask()


def test_what_is_told_of_a_job(asked) -> None:
    loop, job = asked
    for method, value in ((loop.tell, 1.0), (loop.tell, "x"), (loop.fail, "x")):
        with pytest.raises(TypeError, match=r"job 3: expected the nas.Job that `ask` returned"):
            method(3, value)
    with pytest.raises(TypeError, match=r"outcome 1.0: expected an Outcome .*; for a fitness use"):
        loop.report(job, 1.0)
    with pytest.raises(ValueError, match="kind 'time_out' is unknown; did you mean 'timeout'"):
        loop.report(job, Outcome("time_out"))
    with pytest.raises(TypeError, match="error 3: expected an exception, or a text"):
        loop.fail(job, 3)
    loop.tell(job, 1.0)
    assert loop.store.counts().results == 1


def test_a_closed_search_takes_no_result(asked) -> None:
    loop, job = asked
    loop.close()
    assert loop.ask() is None
    with pytest.raises(ValueError, match="the search is closed, and the result of candidate 0 is"):
        loop.tell(job, 1.0)


def test_a_replay_needs_the_store_of_a_run(tmp_path) -> None:
    result = search(tmp_path, cycles=8)
    for reader in (result, tmp_path / "search"):
        with pytest.raises(TypeError, match=r"expected the store of a run; give `result.reader`"):
            nas.replay(reader, Bits())


def test_a_folder_is_a_path() -> None:
    with pytest.raises(TypeError, match="folder 3: expected the path of the folder of runs"):
        nas.Search(space=Bits(), folder=3)


# --- directions -----------------------------------------------------------------------------------


def test_directions_are_those_of_the_run_until_others_are_given(tmp_path) -> None:
    short = {"population": 4, "sample": 2, "cycles": 8}
    search(tmp_path, directions={"energy": "min"}, **short)
    reader = Reader(tmp_path / "search")
    assert reader.study().directions == {"energy": "min"}
    search(tmp_path, **short)
    assert reader.study().directions == {"energy": "min"}
    search(tmp_path, directions={}, **short)
    assert reader.study().directions == {}
    assert "directions" not in reader.study().settings


def test_the_default_length() -> None:
    assert length(None, None) == (1000, None)
    assert length(None, 7) == (70, 7)
