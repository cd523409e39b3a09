"""Test the script that compares ways to keep devices busy; nothing is compiled."""

import importlib
import math
import sys

import pytest
from paths import SCRIPTS


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark_devices")


class Candidates:
    """Whose losses are known."""

    def __init__(self, threads: list[float], rounds: list[float]) -> None:
        self.threads, self.rounds = threads, rounds

    def in_threads(self, devices) -> list[float]:
        return self.threads

    def in_rounds(self, devices):
        return lambda: self.rounds


@pytest.mark.parametrize(
    ("threads", "rounds", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([-2.0, 1.0], [-1.0, 1.0], 0.5),
        ([1.0, math.nan], [1.0, 1.0], math.nan),
        ([1.0, 1.0], [math.nan, 1.0], math.nan),
    ],
)
def test_how_losses_differ(script, threads, rounds, expected) -> None:
    compared = script.compare(Candidates(threads, rounds), [None], 2)
    assert compared["loss_difference"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--devices", "-1"), "--devices -1: expected at least 0"),
        (("--filters", "0"), "--filters 0: expected at least 1"),
        (("--repetitions", "0"), "--repetitions 0: expected at least 1"),
        (
            ("--devices", "0", "--candidates", "17"),
            "--candidates 17: expected a multiple of the 16",
        ),
    ],
)
def test_bad_input(script, monkeypatch, capsys, arguments, error) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_devices.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and error in capsys.readouterr().err
