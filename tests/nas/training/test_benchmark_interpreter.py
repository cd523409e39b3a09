"""The arithmetic of the script that compares the builders; nothing is compiled."""

import importlib
import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # which the script sets, and this takes back
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return importlib.import_module("benchmark_interpreter")


def test_the_difference_is_the_largest_of_all_steps(script) -> None:
    assert script.largest_difference([[2.0, 2.0], [3.0, 2.0], [1.0, 1.0]]) == 0.5
    assert math.isnan(script.largest_difference([[2.0, 2.0], [math.nan, 2.0], [3.0, 2.0]]))


def test_compilations_are_charged_to_the_candidates(script, capsys) -> None:
    times = {"interpreter": ((60, 50), (12, 0)), "static": ((60, 50), (60, 50))}
    accuracies = {"interpreter": (0.5, 0.7), "static": (0.75, 0.25)}
    rows = [
        {
            builder: {
                "seconds": times[builder][i][0],
                "compile_s": times[builder][i][1],
                "fitness": accuracies[builder][i],
            }
            for builder in times
        }
        for i in range(2)
    ]
    script.report_trained(script.trained_by_both.summary(rows), 2)
    assert capsys.readouterr().out.splitlines() == [
        "2 candidates trained, interpreter: mean accuracy 0.6000, 100 an hour, "
        "without compilations 327",
        "2 candidates trained, static: mean accuracy 0.5000, 60 an hour, without compilations 360",
        "ratio of candidates per hour 1.7; accuracies differ by 0.1000 +- 0.3500, their ranks "
        "correlate -1.000",
    ]


@pytest.mark.parametrize(("name", "value"), [("--steps", 0), ("--trained", 1)])
def test_counts_of_which_nothing_comes_are_refused(
    script, monkeypatch, capsys, name, value
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_interpreter.py", name, str(value)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert f"{name} {value}: expected at least" in capsys.readouterr().err
