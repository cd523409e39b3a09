"""The arithmetic of the script that compares the builders; nothing is compiled."""

import argparse
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


def test_the_compilation_is_charged_to_the_search(script, capsys) -> None:
    row = {"compile_s": 26, "interpreter_ms": 20, "static_ms": 10, "ratio": 2, "cpu_ratio": 2}
    rows = [{**row, "loss_difference": value} for value in (1e-6, math.nan)]
    sizes = {"batch": 64, "image": 8, "cells": 1, "filters": 4}
    options = argparse.Namespace(**sizes, steps=7, train=1000)
    script.report({"compile_s": 32, "architectures": rows}, options)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "largest relative difference of a loss in 8 steps: nan",
        "candidates per hour in a search of 2, of 1000 steps of 64 images of 8x8, N = 1, F = 4:",
        "  interpreter 100, static 100, ratio 1.0",
        "  without the interpreter's compilation 180, ratio 1.8",
    ]


@pytest.mark.parametrize("name", ["--steps", "--train"])
def test_no_steps_are_refused(script, monkeypatch, capsys, name) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_interpreter.py", name, "0"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert f"{name} 0: expected at least 1" in capsys.readouterr().err
