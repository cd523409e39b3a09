"""Notice edited code where a search resumes, as in a cell of a notebook that is run again."""

import pytest
from searches import Bits, ones, small

import nas
from nas.errors import MismatchError


def search(folder, evaluate, space=None, cycles: int = 20, **options) -> nas.Result:
    return nas.search(
        space=space or Bits(), evaluate=evaluate, folder=folder, population=5, sample=2,
        cycles=cycles, **options,
    )  # fmt: skip


def first_and_second() -> list:
    """Return two evaluators of one name, as after an edit."""

    def evaluate(bits):
        return ones(bits)

    first = evaluate

    def evaluate(bits):
        return 100 * ones(bits)

    return [first, evaluate]


def test_an_edited_evaluator_is_refused_unless_allowed(tmp_path) -> None:
    first, second = first_and_second()
    before = search(tmp_path, first).best.fitness
    message = (
        "search.sqlite holds 20 results, but since then the code of evaluate has changed: old and "
        "new results may not be comparable; use another name; or, if they are, resume with "
        r"other_evaluator=True, or by resume\(evaluate=\.\.\.\)"
    )
    for cycles in (20, 25):
        with pytest.raises(MismatchError, match=message):
            search(tmp_path, second, cycles=cycles)
    assert search(tmp_path, first).best.fitness == before  # nothing has changed
    result = search(tmp_path, second, cycles=25, other_evaluator=True)
    assert result.best.fitness >= 100
    assert result.reader.last_event("changed")
    search(tmp_path, second, cycles=26)  # which is the run's own now
    with pytest.raises(MismatchError, match="the code of evaluate has changed"):
        search(tmp_path, first, cycles=27)
    nas.load("search", tmp_path).resume(evaluate=first, cycles=27)


def test_an_evaluator_that_never_worked_may_be_corrected(tmp_path) -> None:
    def evaluate(bits):
        raise KeyError("a mistake")

    with pytest.raises(nas.FailuresError):
        search(tmp_path, evaluate)

    def evaluate(bits):
        return ones(bits)

    assert search(tmp_path, evaluate).counts.results == 20


def test_a_closure_is_compared(tmp_path) -> None:
    def make(scale: float):
        return lambda bits: scale * ones(bits)

    search(tmp_path, make(1.0))
    with pytest.raises(MismatchError, match=r"evaluate.scale has changed from 1.0 to 2.0"):
        search(tmp_path, make(2.0))
    assert search(tmp_path, make(1.0), cycles=21).counts.results == 21


class Wide(Bits):
    """Have other choices by the same name."""

    length = 14


def test_an_edited_space_is_refused_unless_allowed(tmp_path) -> None:
    class Same(Bits):
        """Propose otherwise, from the same architectures."""

        def mutate(self, bits, rng):
            return super().mutate(bits, rng)

    search(tmp_path, ones)
    for other in (Wide(), Same()):
        with pytest.raises(
            MismatchError, match=r"since then .*space has changed from Bits.*other_space=T"
        ):
            search(tmp_path, ones, other)
        with pytest.raises(
            MismatchError, match=r"since then .*space has changed from Bits.*other_space=T"
        ):
            small(tmp_path, space=other, population=5, sample=2, cycles=30, cache=True)
    assert search(tmp_path, ones, Same(), cycles=30, other_space=True).counts.results == 30


def test_the_fields_of_a_space_are_compared(tmp_path) -> None:
    space = Bits()
    space.length = 8
    search(tmp_path, ones, space)
    with pytest.raises(MismatchError, match=r"space\.length has changed from 8 to 9"):
        wider = Bits()
        wider.length = 9
        search(tmp_path, ones, wider)


def test_the_measure_of_a_limit_is_compared(tmp_path) -> None:
    search(tmp_path, ones, limits=[nas.Limit("size", lambda bits: sum(bits))])
    with pytest.raises(MismatchError, match=r"the code of limits\['size'\] has changed"):
        search(tmp_path, ones, limits=[nas.Limit("size", lambda bits: 2 * sum(bits))])


def test_a_resumed_search_says_what_it_has_found(tmp_path, capsys) -> None:
    search(tmp_path, ones)
    assert capsys.readouterr().err == ""
    search(tmp_path, ones)
    assert f"nas: {tmp_path / 'search'}: 20 of 20 results found\n" == capsys.readouterr().err
    search(tmp_path, ones, cycles=25)
    assert "20 of 25 results found" in capsys.readouterr().err


def test_a_resumed_search_counts_its_budget(tmp_path, capsys) -> None:
    for cycles in (60, 80):
        search(tmp_path, ones, cycles=cycles, evaluations=8)
    assert "8 of 8 evaluations found" in capsys.readouterr().err


def test_runs_of_earlier_versions_have_no_fingerprints_and_get_them(tmp_path) -> None:
    first, second = first_and_second()
    with small(tmp_path, population=5, sample=2, cycles=20, cache=True) as opened:
        opened.store._set_setting("code", None)
    search(tmp_path, first)
    with pytest.raises(MismatchError, match="the code of evaluate has changed"):
        search(tmp_path, second)


def test_other_code_that_reads_other_architectures_is_refused_in_any_case(tmp_path) -> None:
    class Shifted(Bits):
        def decode(self, text):
            return super().decode(text)[1:]

    search(tmp_path, ones)
    with pytest.raises(MismatchError, match=r"reads the architecture '\d{12}' .* as '\d{11}'"):
        search(tmp_path, ones, Shifted(), other_space=True)
