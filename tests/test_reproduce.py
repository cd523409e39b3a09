"""The arithmetic of the scripts that reproduce the paper's tables; nothing is compiled."""

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
    for each in ("tables", name):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("reproduce_table1", monkeypatch)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("reproduce_table2", monkeypatch)


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("start", "limit", "tried"),
    [(3, 5, [3, 4, 5, 6]), (3, 3, [3, 4]), (6, 4, [6, 5, 4]), (2, 0, [2, 1])],
)
def test_the_largest_that_fits(one: ModuleType, start: int, limit: int, tried: list) -> None:
    asked = []
    assert one.largest(start, lambda n: asked.append(n) or n <= limit) == limit
    assert asked == tried


@pytest.mark.parametrize("K", [1, 8, 32, 128])
def test_blocks_are_the_papers(one: ModuleType, K: int) -> None:
    assert (one.blocks(13, K),) == one.PAPER["transformer"][K].size


def test_table_1(one: ModuleType) -> None:
    memory = {"parameters": 6 * GIB, "stash": 4 * GIB}
    same = one.Measured((103,), 5_318_000_000, memory, 11 * GIB, True, 61.2)
    best = same._replace(size=(119,), parameters=6_120_000_000, memory={"stash": 15 * GIB})
    none = one.Measured((13,), 786_000_000, memory, 0, None, problem="too long")
    papers = one.PAPER["transformer"]
    rows = [one.Row(8, papers[8], same, best), one.Row(1, papers[1], none, None)]
    table = words(one.table("transformer", rows))
    ours = ["5.32B", "yes", "11.00", "10.00", "1.10", "61"]
    best = ["119", "6.12B", "1.16", "yes", "11.00", "15.00", "0.73"]
    assert table[2] == ["8", "103", "5.3B", "13.80", *ours, *best]
    assert table[3] == ["1", "13", "786M", "15.20", "786M", "unknown", "10.00", "0", "none"]
    found = list(one.records("transformer", rows))
    assert [(r["stages"], r["which"]) for r in found] == [
        (8, "the paper's"),
        (8, "largest"),
        (1, "the paper's"),
    ]
    assert found[1]["growth"] == pytest.approx(119 / 103)
    assert found[0]["parameters_gib"] == 6
    assert found[2]["compiled_gib"] is None


def cell(two: ModuleType, K: int, M: int, seconds: float, fits: bool = True, V: int = 1):
    step = StepTime(0.5 * seconds, 0.2 * seconds, 0.1 * seconds, 0.2 * seconds, 0, 0, 0)
    layout = Layout(K, micro_batches=M, chunks=V)
    return two.Cell("transformer", layout, 32, "layers", step, 1.1, 1.05, 20.0, fits)


def test_table_2(two: ModuleType) -> None:
    cells = [cell(two, 4, 32, 2.5), cell(two, 2, 1, 10.0, fits=False), cell(two, 4, 1, 8.0),
             cell(two, 2, 32, 5.0)]  # fmt: skip
    assert two.normalised(cells) == {(2, 1): 1, (4, 1): 1.25, (2, 32): 2, (4, 32): 4}
    interleaved = [cell(two, K, 32, seconds, V=2) for K, seconds in ((2, 5.0), (4, 2.0))]
    lines = two.throughput_table(cells, interleaved).splitlines()
    assert [line.split() for line in lines][2:] == [
        ["1", "1.00*", "1.0", "1.25", "1.07"],
        ["32", "2.00", "1.8", "4.00", "3.4"],
        ["32,", "V", "2", "2.00", "5.00"],
    ]
    row = words(two.breakdown_table(cells))[2]
    assert row[:6] == ["4", "32", "1", "layers", "2.5", "12.8"]
    assert row[6:] == ["50.0", "20.0", "10.0", "20.0", "0.0", "0.0", "1.100", "1.050", "20.00",
                       "yes"]  # fmt: skip
    assert [r["normalised"] for r in two.records(cells, 3.2)] == [4, 1, 1.25, 2]


def test_stages_and_batches(two: ModuleType) -> None:
    assert two.of_stages([1, 2, 3, 4], [range(0, 3), range(3, 4)]) == [6, 4]
    assert two.imbalance([6, 4]) == pytest.approx(1.2)
    assert [two.batch_of("amoebanet", M, "batch") for M in (1, 32)] == [128, 128]
    assert [two.batch_of("amoebanet", M, "micro-batch") for M in (1, 32)] == [4, 128]


def test_interleaved(two: ModuleType) -> None:
    assert two.theoretical_speedup(8, 8, 2) == pytest.approx(15 / 11.5)
    cells = [cell(two, 8, 8, 3.0), cell(two, 8, 8, 2.4, V=2)]
    assert words(two.interleaved_table(cells))[3][3:5] == ["1.250", "1.304"]


def test_files(one: ModuleType, two: ModuleType, tmp_path: Path) -> None:
    tables = sys.modules["tables"]
    tables.write_csv(tmp_path / "a.csv", [{"a": 1}, {"a": None, "b": 2}])
    with (tmp_path / "a.csv").open() as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", ""], ["", "2"]]
    same = one.Measured((103,), 5_318_000_000, {}, 0, True)
    one.draw("transformer", [one.Row(8, one.PAPER["transformer"][8], same, same)], tmp_path / "1")
    cells = [cell(two, K, M, 10.0 / K) for K in (2, 4) for M in (1, 32)]
    two.draw(cells, tmp_path / "2")
    two.draw_interleaved(cells[:1], tmp_path / "3")
    assert all((tmp_path / f"{n}.png").stat().st_size > 1000 for n in (1, 2, 3))
