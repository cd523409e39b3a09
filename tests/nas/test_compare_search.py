"""Test the script that compares algorithms by real training; here nothing is trained."""

import importlib
import json
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from paths import SCRIPTS

import nas
from nas.evaluators.evaluator import identity_of

OVERRIDES = ("evolution.population=4", "evolution.sample=2", "run.cycles=8", "run.workers=1")


INTERRUPTED = "interrupted; run the same command again to resume"


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """`compare(...)` of small runs in a new folder: (code, lines, stderr)."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("compare_search")
    config = str(SCRIPTS.parent / "configs" / "search_digits.yaml")

    def run(*arguments: str):
        given = ["compare_search.py", config, *OVERRIDES, *arguments, "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", given)
        try:
            code = script.main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def training(monkeypatch, evaluate) -> list[tuple[int, nas.Job]]:
    """Replace training by `evaluate`; return the list of what is trained: (epochs, job)."""
    jobs = []

    def train(self, job: nas.Job) -> dict:
        jobs.append((self.epochs, job))
        return {"fitness": evaluate(self, job)}

    monkeypatch.setattr(nas.TrainingEvaluator, "evaluate", train)
    return jobs


def test_what_fails_when_trained_again_is_null(compare, monkeypatch) -> None:
    def evaluate(evaluator, job: nas.Job) -> float:
        return job.seed / 2**31 if evaluator.epochs == 6 else float("nan")

    jobs = training(monkeypatch, evaluate)
    code, lines, err = compare("--seeds", "2", "--json")
    assert code == 0, err
    figures = json.loads(lines[-1], parse_constant=pytest.fail)
    again = figures["measured"]["best trained again"]
    assert again == {name: [None, None] for name in ("aging", "non_aging", "random")}
    assert len(figures["measured"]["population's last 4"]["aging"]) == 2
    assert Path(figures["plot"]).is_file()
    first = [job.seed for epochs, job in jobs if epochs == 6 and job.candidate < 4]
    assert len(first) == len(set(first)) == 8  # once for all algorithms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate.stop_epoch=3",), "evaluate.stop_epoch 3: candidates are trained once for all"),
        (("evolution.fitness_policy=retrain_warm",), "evolution.fitness_policy retrain_warm: "),
        (("evolution.algorithm=random",), "evolution.algorithm random: this compares aging, non_"),
        (("run.target=0.9",), "run.target 0.9: budgets must be equal, but this ends some runs"),
        (("run.time_limit_s=0.001",), "run.time_limit_s 0.001: budgets must be equal, but this"),
        (("--epochs", "0"), "`epochs` must be a whole number of at least 1, got 0"),
    ],
)
def test_incomparable_configs_are_rejected(compare, monkeypatch, arguments, message) -> None:
    jobs = training(monkeypatch, lambda evaluator, job: 1.0)
    code, _, err = compare(*arguments)
    assert code == 2 and message in err and not jobs


def test_no_plot_is_known_before_the_runs(compare, monkeypatch) -> None:
    jobs = training(monkeypatch, lambda evaluator, job: 1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = compare()
    assert code == 2 and "pictures need matplotlib" in err and not jobs


def test_too_many_failures_end_it(compare, monkeypatch) -> None:
    training(monkeypatch, lambda evaluator, job: float("nan"))
    code, _, err = compare("run.max_failures=3")
    assert code == 1 and "3 evaluations have failed in a row" in err


def test_to_compile_is_no_training_for_any_algorithm(compare, monkeypatch, tmp_path) -> None:
    """Check that the first one, which compiles for all, has as much time as in other searches."""

    def evaluate(evaluator, job: nas.Job) -> float:
        time.sleep(0.5 * (len(jobs) == 1))
        return job.seed / 2**31

    jobs = training(monkeypatch, evaluate)
    code, _, err = compare("run.timeout_s=0.1", "--seeds", "1")
    assert code == 0, err
    assert nas.load("aging-0", tmp_path).counts.failures == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (sqlite3.DatabaseError("malformed"), (2, "compare_search.py: malformed\n")),
        (TypeError("no fitness"), (1, "compare_search.py: no fitness\n")),
        (
            KeyboardInterrupt(),
            (130, "compare_search.py: interrupted; run the same command again to resume\n"),
        ),
    ],
)
def test_errors_are_reported_in_one_line(compare, monkeypatch, error, expected) -> None:
    def search(**options):
        raise error

    monkeypatch.setattr(nas, "search", search)
    code, _, err = compare()
    assert (code, err) == expected


def test_folder_resumes_with_the_same_training_only(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("compare_search")

    def of(epochs: int) -> nas.TrainingEvaluator:
        return nas.TrainingEvaluator(data="digits", epochs=epochs)

    short, long = (identity_of(script.Remembered(of(epochs))) for epochs in (3, 9))
    assert short != long and short == identity_of(script.Remembered(of(3)))
