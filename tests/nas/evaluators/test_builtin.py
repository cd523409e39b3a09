"""Check a table at the start of a search, and say what it lacks."""

import re
from pathlib import Path

import pytest
from searches import DATA, HAS_TABLE, NO_TABLE, Bits, ones

import nas
from nas.errors import ReturnError


def table(bits) -> dict[str, float]:
    return {"accuracy": ones(bits), "params_m": 1.0}


def search(folder: Path, evaluate, **options) -> nas.Result:
    sizes = {"population": 4, "sample": 2, "cycles": 8, "folder": folder}
    return nas.search(evaluate=evaluate, **{"space": Bits(), **sizes, **options})


@pytest.mark.parametrize(
    ("fitness", "rule"),
    [
        ("valid12", "`fitness` 'valid12' is not in the table, which has accuracy, params_m; give"),
        ("acuracy", "which has accuracy, params_m; did you mean 'accuracy'?"),
    ],
)
def test_a_column_that_the_table_lacks_is_noticed_at_the_start(tmp_path, fitness, rule) -> None:
    with pytest.raises(ValueError, match=re.escape(rule)):
        search(tmp_path, nas.TabularEvaluator(table, fitness))
    assert not list(tmp_path.iterdir())


def test_repeats_check_their_table_too(tmp_path) -> None:
    with pytest.raises(ValueError, match="`fitness` 'valid12' is not in the table"):
        search(tmp_path, nas.Repeated(nas.TabularEvaluator(table)))


def test_a_table_of_other_values(tmp_path) -> None:
    rule = "the table returned a value of type float: expected a dict of metrics"
    with pytest.raises(ValueError, match=rule):
        search(tmp_path, nas.TabularEvaluator(ones))


def test_a_table_that_lacks_architectures_says_which(tmp_path) -> None:
    evaluator = nas.TabularEvaluator({(1,) * 12: {"accuracy": 1.0}}.__getitem__, "accuracy")
    with pytest.raises(
        nas.FailuresError, match=r"LookupError: the table has no entry for \(1, 1, 0"
    ):
        search(tmp_path, evaluator, max_failures=2)


def test_a_row_without_the_column() -> None:
    evaluator = nas.TabularEvaluator(lambda bits: {"loss": 1.0}, "accuracy")
    with pytest.raises(ReturnError, match="`fitness` 'accuracy' is not in the table, which has lo"):
        evaluator.evaluate(nas.Job(1, 0, (1, 0), 7))


@pytest.mark.parametrize("value", [{(0, 1): {"accuracy": 1.0}}, 3])
def test_a_table_is_a_function(value) -> None:
    rule = f"table of type {type(value).__name__}: expected a function .* give its `__getitem__`"
    with pytest.raises(TypeError, match=rule):
        nas.TabularEvaluator(value)


@pytest.mark.skipif(not HAS_TABLE, reason=NO_TABLE)
def test_the_table_of_nasbench201_has_cells_of_its_space_only(tmp_path) -> None:
    evaluator = nas.TabularEvaluator(nas.NASBench201Table("cifar10", DATA))
    with pytest.raises(
        ValueError, match=r"is not a cell of NAS-Bench-201: expected the operations o"
    ):
        search(tmp_path, evaluator)
    rule = "`fitness` 'valid13' is not in the table, .*; did you mean 'valid12'"
    with pytest.raises(ValueError, match=rule):
        search(tmp_path, nas.TabularEvaluator(evaluator.table, "valid13"), space="nasbench201")
    assert evaluator.table([3] * 6) == evaluator.table((3,) * 6)
