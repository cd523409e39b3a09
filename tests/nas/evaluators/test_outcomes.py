"""Turn what an evaluator returns into outcomes: what is no metric costs no training."""

import asyncio
import math

import numpy as np
import pytest
from searches import Bits, drive, ones, small

import nas
from nas.errors import ReturnError
from nas.evaluators.evaluator import as_evaluator
from nas.evaluators.outcomes import as_outcome
from nas.workers.task import run_job

JOB = nas.Job(1, 0, (), 0)
OPTIONS = {"space": Bits(), "population": 8, "sample": 3, "cycles": 40, "cache": False}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("note", "fine", r"note 'fine' (str)"),
        ("curve", [1, 2], r"curve [1, 2] (list)"),
        ("curve", np.ones(2), r"curve array([1., 1.]) (ndarray of shape (2,))"),
        ("x", None, r"x None (NoneType)"),
        ("x", 1j, r"x 1j (complex)"),
        (3, 1.0, r"3 1.0 (float)"),
        (("a", "b"), 1.0, r"('a', 'b') 1.0 (float)"),
    ],
)
def test_a_metric_that_is_no_number_is_left_out(name, value, text) -> None:
    outcome = as_outcome({"fitness": 1.0, name: value, "loss": 2}, JOB)
    assert (outcome.kind, outcome.fitness, outcome.metrics) == ("ok", 1.0, {"loss": 2.0})
    assert outcome.error == f"{text} left out: metrics are numbers with texts as names"


@pytest.mark.parametrize("name", ["fitness", "loss"])
def test_an_array_whose_computation_fails_is_a_failure(name) -> None:
    """JAX reports that an accelerator has failed when the value is read."""

    class Value:
        def __float__(self) -> float:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    class Evaluator:
        def evaluate(self, job: nas.Job) -> dict:
            return {"fitness": 1.0, name: Value()}

    outcome = run_job(as_evaluator(Evaluator()), JOB)
    assert outcome.kind == "out_of_memory"


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), SystemExit(3)])
def test_errors_that_are_no_exceptions_are_failures(error) -> None:
    def evaluate(architecture) -> float:
        raise error

    outcome = run_job(as_evaluator(evaluate), JOB)
    assert outcome.kind == "exception" and type(error).__name__ in outcome.error


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_a_metric_may_be_true_or_false(value) -> None:
    outcome = as_outcome({"fitness": value, "converged": value, "stuck": not value}, JOB)
    assert outcome.metrics == {"converged": 1.0, "stuck": 0.0} and outcome.error is None
    assert outcome.fitness == 1.0


def test_a_search_warns_once_of_what_it_leaves_out(tmp_path) -> None:
    def evaluate(bits) -> dict:
        return {"fitness": ones(bits), "note": "fine", "zeros": 12 - ones(bits)}

    with pytest.warns(
        RuntimeWarning, match=r"evaluate returned note 'fine' \(str\) left out: metrics are"
    ) as warned:
        result = nas.search(evaluate=evaluate, folder=tmp_path, **OPTIONS)
    assert len(warned) == 1 and result.counts.results == 40 and result.counts.failures == 0
    assert set(result.best.metrics) == {"zeros"}
    assert all(result.evaluations["error"].str.contains("note 'fine'"))


# --- infinite fitness -----------------------------------------------------------------------------


@pytest.mark.parametrize("maximise", [True, False])
def test_the_worst_infinity_is_a_result(tmp_path, maximise) -> None:
    """Use it for what is infeasible: it ages and leaves as others do, and is no parent."""
    worst = -math.inf if maximise else math.inf
    sign = 1 if maximise else -1

    def evaluate(job: nas.Job) -> float:
        infeasible = sum(job.architecture[:3]) == 3 if maximise else sum(job.architecture[:2]) > 0
        return worst if infeasible else sign * ones(job.architecture)

    with small(tmp_path, maximise=maximise, cycles=200, cache=True) as search:
        drive(search, evaluate)
        counts = search.store.counts()
        rows = list(search.store.candidates())
        infeasible = [row for row in rows if row.fitness == worst]
        assert counts.results == 200 and counts.failures == counts.failed == 0
        assert len(infeasible) > 10 and math.isfinite(search.best_fitness)
        assert any(row.answered_by is not None for row in infeasible)
        assert len(search.evolution.members) == 8
        nas.replay(search.store, Bits())


def test_a_search_of_infeasible_candidates_only(tmp_path) -> None:
    result = nas.search(evaluate=lambda bits: -math.inf, folder=tmp_path, **OPTIONS)
    assert result.counts.results == 40 and result.best.fitness == -math.inf
    result.plot()
    assert "40 results" in repr(result)


@pytest.mark.parametrize(("fitness", "maximise"), [(math.inf, True), (-math.inf, False)])
def test_the_best_infinity_is_a_failure(tmp_path, fitness, maximise) -> None:
    aim = "maximises" if maximise else "minimises"
    with small(tmp_path, maximise=maximise, max_failures=2) as search:
        search.tell(search.ask(), fitness)
        (row,) = search.store.evaluations()
        assert row.outcome == "nan" and row.fitness is None
        assert row.error == f"the fitness is {fitness}, which nothing beats, as the search {aim}"
        drive(search)


def test_repeats_with_infinite_fitness() -> None:
    class Sometimes:
        def evaluate(self, job: nas.Job) -> float:
            return -math.inf if job.seed < 2 else 1.0

    assert nas.Repeated(Sometimes(), 2).evaluate(JOB) == {"fitness": -math.inf, "fitness_std": 0.0}
    assert nas.Repeated(Sometimes(), 3).evaluate(JOB)["fitness_std"] == math.inf


# --- a fitness that is none -----------------------------------------------------------------------


def test_a_return_that_is_none_later_on_is_a_failure(tmp_path) -> None:
    def evaluate(bits) -> float | None:
        return None if bits[:2] == (0, 0) and seen.append(bits) is None else ones(bits)

    seen: list = []
    result = nas.search(evaluate=evaluate, folder=tmp_path, max_failures=99, **OPTIONS)
    assert result.counts.results == 40 and result.counts.failures == len(seen) > 0
    errors = set(result.evaluations["error"].dropna())
    assert all("returned None (NoneType) as fitness of candidate" in error for error in errors)
    nas.replay(result.reader, Bits())


def test_a_first_return_that_is_none_ends_the_search_which_resumes_past_it(tmp_path) -> None:
    def evaluate(bits) -> float | None:
        return None if bits == first else ones(bits)

    with nas.Search(folder=tmp_path, **OPTIONS) as search:
        first = search.ask().architecture
    ended = 0
    for _ in range(4):
        try:
            result = nas.search(evaluate=evaluate, folder=tmp_path, **OPTIONS)
            break
        except ReturnError:
            ended += 1
    assert ended == 2 and result.counts.results == 40 and result.counts.failed == 1
