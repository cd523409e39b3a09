"""Check the arithmetic of the scripts that reproduce the paper's tables, without compiling."""

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from paths import SCRIPTS

from gpipe_jax.planner.job import Layout
from gpipe_jax.planner.step_time import StepTime

GIB = 2**30


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for module in ("tables", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def table1(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("reproduce_table1", monkeypatch)


@pytest.fixture
def table2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("reproduce_table2", monkeypatch)


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("start", "limit", "tried"),
    [(3, 5, [3, 4, 5, 6]), (3, 3, [3, 4]), (6, 4, [6, 5, 4]), (2, 0, [2, 1])],
)
def test_the_largest_that_fits(table1: ModuleType, start: int, limit: int, tried: list) -> None:
    tries = []
    assert table1.largest(start, lambda n: tries.append(n) or n <= limit) == limit
    assert tries == tried


@pytest.mark.parametrize("K", [1, 8, 32, 128])
def test_blocks_as_in_the_paper(table1: ModuleType, K: int) -> None:
    assert (table1.blocks(13, K),) == table1.PAPER["transformer"][K].size


def test_table_1(table1: ModuleType) -> None:
    memory = {"parameters": 6 * GIB, "stash": 4 * GIB}
    same = table1.Measured((103,), 5_318_000_000, memory, 11 * GIB, True, 61.2)
    best = same._replace(size=(119,), parameters=6_120_000_000, memory={"stash": 15 * GIB})
    none = table1.Measured((13,), 786_000_000, memory, 0, None, problem="too long")
    papers = table1.PAPER["transformer"]
    rows = [table1.Row(8, papers[8], same, best), table1.Row(1, papers[1], none, None)]
    table = words(table1.table("transformer", rows))
    ours = ["5.32B", "yes", "11.00", "10.00", "1.10", "61"]
    best = ["119", "6.12B", "1.16", "yes", "11.00", "15.00", "0.73"]
    assert table[2] == ["8", "103", "5.3B", "13.80", *ours, *best]
    assert table[3] == ["1", "13", "786M", "15.20", "786M", "unknown", "10.00", "0", "none"]
    records = list(table1.records("transformer", rows))
    assert [(r["stages"], r["which"]) for r in records] == [
        (8, "the paper's"),
        (8, "largest"),
        (1, "the paper's"),
    ]
    assert records[1]["growth"] == pytest.approx(119 / 103)
    assert records[0]["parameters_gib"] == 6
    assert records[2]["compiled_gib"] is None


def cell(table2: ModuleType, K: int, M: int, seconds: float, fits: bool = True, V: int = 1):
    step = StepTime(0.5 * seconds, 0.2 * seconds, 0.1 * seconds, 0.2 * seconds, 0, 0, 0)
    layout = Layout(K, micro_batches=M, chunks=V)
    return table2.Cell("transformer", layout, 32, "layers", step, 1.1, 1.05, 20.0, fits)


def test_table_2(table2: ModuleType) -> None:
    cells = [
        cell(table2, 4, 32, 2.5),
        cell(table2, 2, 1, 10.0, fits=False),
        cell(table2, 4, 1, 8.0),
        cell(table2, 2, 32, 5.0),
    ]
    assert table2.normalised(cells) == {(2, 1): 1, (4, 1): 1.25, (2, 32): 2, (4, 32): 4}
    interleaved = [cell(table2, K, 32, seconds, V=2) for K, seconds in ((2, 5.0), (4, 2.0))]
    lines = table2.throughput_table(cells, interleaved).splitlines()
    assert [line.split() for line in lines][2:] == [
        ["1", "1.00*", "1.0", "1.25", "1.07"],
        ["32", "2.00", "1.8", "4.00", "3.4"],
        ["32,", "V", "2", "2.00", "5.00"],
    ]
    row = words(table2.breakdown_table(cells))[2]
    assert row[:6] == ["4", "32", "1", "layers", "2.5", "12.8"]
    assert row[6:] == ["50.0", "20.0", "10.0", "20.0", "0.0", "0.0", "1.100", "1.050", "20.00",
                       "yes"]  # fmt: skip
    assert [r["normalised"] for r in table2.records(cells, 3.2)] == [4, 1, 1.25, 2]


def test_stages_and_batches(table2: ModuleType) -> None:
    assert table2.of_stages([1, 2, 3, 4], [range(0, 3), range(3, 4)]) == [6, 4]
    assert table2.imbalance([6, 4]) == pytest.approx(1.2)
    assert [table2.batch_of("amoebanet", M, "batch") for M in (1, 32)] == [128, 128]
    assert [table2.batch_of("amoebanet", M, "micro-batch") for M in (1, 32)] == [4, 128]


def test_interleaved(table2: ModuleType) -> None:
    assert table2.theoretical_speedup(8, 8, 2) == pytest.approx(15 / 11.5)
    cells = [cell(table2, 8, 8, 3.0), cell(table2, 8, 8, 2.4, V=2)]
    assert words(table2.interleaved_table(cells))[3][3:5] == ["1.250", "1.304"]


def test_files(table1: ModuleType, table2: ModuleType, tmp_path: Path) -> None:
    tables = sys.modules["tables"]
    tables.write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": None, "b": 2}])
    with (tmp_path / "a.csv").open() as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", ""], ["", "2"]]
    same = table1.Measured((103,), 5_318_000_000, {}, 0, True)
    table1.draw(
        "transformer", [table1.Row(8, table1.PAPER["transformer"][8], same, same)], tmp_path / "1"
    )
    cells = [cell(table2, K, M, 10.0 / K) for K in (2, 4) for M in (1, 32)]
    table2.draw(cells, tmp_path / "2")
    table2.draw_interleaved(cells[:1], tmp_path / "3")
    assert all((tmp_path / f"{n}.png").stat().st_size > 1000 for n in (1, 2, 3))
