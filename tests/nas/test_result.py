"""Arguments of a result's methods are checked, and numbers of NumPy are legal."""

import numpy as np
import pytest
from searches import Bits, ones

import nas
from nas.errors import MismatchError


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> nas.Result:
    folder = tmp_path_factory.mktemp("runs")
    return nas.search(space=Bits(), evaluate=ones, population=4, sample=2, cycles=12, folder=folder)


def test_a_number_of_numpy_names_a_candidate(result) -> None:
    assert result.candidate(np.int64(3)).number == 3
    assert result.lineage(np.int64(3))[-1].number == 3
    best = result.history["fitness"].idxmax()
    assert result.candidate(best).fitness == result.best.fitness


@pytest.mark.parametrize("number", ["3", None, -1, 3.0, True])
def test_a_candidate_has_a_whole_number(result, number) -> None:
    for method in (result.candidate, result.lineage):
        with pytest.raises(ValueError, match="`number` must be a whole number of at least 0, got"):
            method(number)


def test_a_candidate_that_there_is_not(result) -> None:
    rule = "there is no candidate 99 in .*search.sqlite: give a number from 0 to 11"
    with pytest.raises(KeyError, match=rule):
        result.candidate(99)


@pytest.mark.parametrize("count", [0, -1, 1.5, "3"])
def test_the_number_of_the_best_is_a_count(result, count) -> None:
    with pytest.raises(ValueError, match="`count` must be a whole number of at least 1, got"):
        result.top(count)
    assert len(result.top(np.int64(2))) == 2


@pytest.mark.parametrize("seconds", [0, -1, "x", float("nan")])
def test_seconds_of_watching_and_waiting(result, seconds) -> None:
    with pytest.raises(ValueError, match=r"every_s .*: expected seconds, more than 0, or None"):
        result.watch(every_s=seconds)
    with pytest.raises(ValueError, match=r"timeout_s .*: expected seconds, more than 0, or None"):
        result.wait(timeout_s=seconds)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"population": 9}, "population 9: the run has 4; a search cannot be resumed with other"),
        ({"name": "x"}, "name 'x': the run has 'search'; a search cannot be resumed with other"),
        ({"seed": 1, "sample": 3}, "seed 1: the run has 0; sample 3: the run has 2; a search"),
    ],
)
def test_what_is_fixed_when_a_search_is_resumed(result, options, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        result.resume(**options)


def test_equal_values_are_legal_when_a_search_is_resumed(result) -> None:
    assert result.resume(population=4, name="search", cycles=12).counts.results == 12


@pytest.mark.parametrize("path", [3, None, b"search"])
def test_names_and_folders_are_paths(path) -> None:
    with pytest.raises(TypeError, match=r"name .*: expected a text or a path"):
        nas.load(path)
    with pytest.raises(TypeError, match=r"folder .*: expected a text or a path"):
        nas.load("search", path)
    with pytest.raises(TypeError, match=r"folder .*: expected a text or a path"):
        nas.search(space=Bits(), evaluate=ones, folder=path)


def test_a_resumed_search_takes_the_arguments_that_its_errors_name(tmp_path) -> None:
    settings = {"population": 5, "sample": 2, "folder": tmp_path, "name": "a"}
    nas.search(space=Bits(), evaluate=ones, cycles=6, **settings)
    again = nas.load("a", tmp_path)
    again.resume(other_evaluator=True, other_space=True, name="a", folder=tmp_path, cycles=7)
    assert again.counts.results == 7
    assert again.resume(space=Bits(), cycles=8).counts.results == 8
    with pytest.raises(MismatchError, match="of the space 'bits', but the given one is 'nasnet'"):
        again.resume(space="nasnet")
