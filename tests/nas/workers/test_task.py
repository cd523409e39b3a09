"""Errors of any kind become outcomes, and jobs that cannot be sent end the search at once."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from searches import Bits, ones

import nas
from nas.errors import WorkersError
from nas.evaluators.evaluator import as_evaluator
from nas.pickles import pickling, sending
from nas.workers import task

JOB = nas.Job(1, 0, (1, 0, 1), 7)


class WithoutTextError(Exception):
    """Raise for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def raising(error: BaseException):
    def evaluate(bits) -> float:
        raise error

    return as_evaluator(evaluate)


def test_an_error_without_a_text_is_what_it_is() -> None:
    outcome = task.run_job(raising(WithoutTextError()), JOB)
    assert outcome.kind == "exception" and "WithoutTextError" in (outcome.error or "")


def test_such_an_error_ends_as_an_exception_of_the_evaluator(tmp_path: Path) -> None:
    with pytest.raises(nas.FailuresError, match=r"by exception: .*WithoutTextError"):
        nas.search(
            space=Bits(), evaluate=raising(WithoutTextError()), folder=tmp_path, max_failures=2
        )
    result = nas.load("search", tmp_path)
    assert result.reader.failures_by_kind() == {"exception": 2}


def test_the_name_of_a_file_that_is_no_utf_8_can_be_stored(tmp_path: Path) -> None:
    error = FileNotFoundError(2, "No such file", "caf\udce9.npy")
    with pytest.raises(nas.FailuresError, match=r"by exception: .*caf.*udce9.npy"):
        nas.search(space=Bits(), evaluate=raising(error), folder=tmp_path, max_failures=2)


def test_a_value_without_a_text_is_described() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

    evaluator = as_evaluator(lambda bits: Silent())
    with pytest.raises(nas.errors.ReturnError, match=r"a Silent without a text .* as fitness of c"):
        task.run_job(evaluator, JOB)


class Unpicklable(Bits):
    """Have architectures with a part that no pickler takes."""

    name = "unpicklable"

    def random(self, rng):
        return Fragile(super().random(rng))

    def mutate(self, bits, rng):
        child, words = super().mutate(tuple(bits), rng)
        return Fragile(child), words

    def decode(self, text):
        return Fragile(super().decode(text))


class Fragile(tuple):
    """Refuse to be pickled."""

    def __reduce__(self) -> tuple:
        raise TypeError("cannot be pickled")

    def __deepcopy__(self, memo: dict) -> "Fragile":
        return self


def first_ones(bits) -> float:
    return ones(tuple(bits))


def test_an_architecture_that_cannot_be_pickled_is_no_dead_worker(tmp_path: Path) -> None:
    """Neither is it tried again: the search resumes on threads."""
    options = {"population": 4, "sample": 2, "cycles": 8, "folder": tmp_path, "name": "run"}
    message = r"the architecture of candidate 0 cannot be sent .*\(TypeError: .*\): make arch"
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(WorkersError, match=message),
    ):
        nas.search(space=Unpicklable(), evaluate=first_ones, workers=pool, **options)
    result = nas.load("run", tmp_path)
    assert result.counts.failures == 0 and result.counts.proposed == 1
    result = nas.search(space=Unpicklable(), evaluate=first_ones, **options)
    assert result.counts.results == 8


def test_an_architecture_that_cannot_be_read_by_the_worker_is_no_dead_worker() -> None:
    parcel = sending.in_each_job(pickling.dumps(as_evaluator(sum)))
    outcome = task._run_pickled(parcel, b"cno_such_module\nCell\n.")
    assert outcome.kind == "exception" and "No module named 'no_such_module'" in outcome.error
