"""Test the arithmetic of the script that compares the builders; nothing is compiled."""

import importlib
import math
import sys
from random import Random
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy
from paths import SCRIPTS

import nas
from nas.errors import TooLargeError
from nas.training import weights
from nas.training.network import Shape


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
    times = {
        "interpreter": ((60, 50), (12, 0)),
        "static": ((60, 50), (60, 50)),
        "itself": ((10, 0), (10, 0)),  # which is not counted
    }
    accuracies = {"interpreter": (0.5, 0.7), "static": (0.75, 0.25), "itself": (0.75, 0.35)}
    rows = [
        {
            builder: {
                "seconds": times[builder][i][0],
                "train_s": times[builder][i][0] - times[builder][i][1],
                "fitness": accuracies[builder][i],
                "compilations": 3 if times[builder][i][1] else 0,
            }
            for builder in times
        }
        for i in range(2)
    ]
    script.report_trained(script.trained_by_both.summary(rows), 2)
    assert capsys.readouterr().out.splitlines() == [
        "2 candidates trained, interpreter: mean accuracy 0.6000, 100 an hour, 3 programs "
        "compiled; without compilations 327 an hour",
        "2 candidates trained, static: mean accuracy 0.5000, 60 an hour, 6 programs compiled; "
        "without compilations 360 an hour",
        "ratio of candidates per hour 1.7; accuracies differ by 0.1000 +- 0.3500, those of "
        "the static program from itself by 0.0500 +- 0.0500; the builders' ranks correlate -1.000",
    ]


def test_equal_accuracies_have_no_rank_correlation(script, capsys) -> None:
    measures = {"seconds": 60, "train_s": 60, "fitness": 0.1, "compilations": 3}
    rows = [
        {"interpreter": measures, "static": measures | {"fitness": fitness}, "itself": measures}
        for fitness in (0.1, 0.2)
    ]
    figures = script.trained_by_both.summary(rows)
    assert figures["rank_correlation"] is None
    script.report_trained(figures, 2)
    assert capsys.readouterr().out.endswith("the builders' ranks correlate undefined\n")


def run(script, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark_interpreter.py", *arguments])
    return script.main()


def test_candidates_are_from_the_space_of_the_config(script, monkeypatch) -> None:
    def train(evaluators, network, number, genotype):
        trained.append((number, genotype))
        measures = {"seconds": 1, "train_s": 1, "fitness": number, "compilations": 3}
        return dict.fromkeys(script.trained_by_both.TRAINED, measures)

    trained = []
    monkeypatch.setattr(script.trained_by_both, "train", train)
    small = ("space.pairs=2", "space.operations=[sep_3x3, conv_1x1]")
    config = ("--config", str(SCRIPTS.parent / "configs" / "search_digits.yaml"), *small)
    options = ("--architectures", "0", "--first", "2", "--trained", "3")
    before = jax.config.jax_compilation_cache_dir
    assert run(script, monkeypatch, *config, *options) == 0
    space = nas.NASNetSpace(2, ("sep_3x3", "conv_1x1"))
    assert trained == [(seed, space.random(Random(seed))) for seed in (2, 3, 4)]
    assert jax.config.jax_compilation_cache_dir == before


def test_control_starts_from_values_changed_in_the_last_digit(
    script, monkeypatch, tmp_path
) -> None:
    def evaluate(job):
        _, values = weights.load(tmp_path / job.inherit, network)
        seen.append((job.seed, jax.tree.map(np.asarray, values.parameters)))
        return {"fitness": 0.5, "compile_s": 0, "train_s": 1}

    seen, genotype = [], nas.NASNetSpace().random(Random(0))
    network = toy.Toy(Shape(1, 1, 8, 1, 10))
    monkeypatch.setattr(script.trained_by_both, "to_static", lambda *given: given[-1])
    evaluator = SimpleNamespace(run=str(tmp_path), evaluate=evaluate)
    builders = dict.fromkeys(("interpreter", "static"), evaluator)
    assert list(script.trained_by_both.train(builders, network, 7, genotype)) == [
        "interpreter",
        "static",
        "itself",
    ]
    (seed, own), (_, same), (_, moved) = seen
    assert {seed for seed, _ in seen} == {seed}
    for a, b, c in zip(*map(jax.tree.leaves, (own, same, moved)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert 0 < np.abs(c - b).max() < 3e-7 * np.abs(b).max()


CONFIGS = SCRIPTS.parent / "configs"
BAD = [
    (("--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
    (("--config", str(CONFIGS / "nasbench201.yaml")), "evaluate.kind table: both builders train; "),
    (("evaluate={kind: function}",), "evaluate.kind function: both builders train; use training"),
    (("evaluate.epochs=no",), "evaluate.epochs: expected a whole number"),
    (("evaluate.batch_size=2000",), "batch_size 2000 is more than the 512 training images of"),
    (("evaluate.filters=1",), "`filters` is 1, but the narrowest cell needs 2 features"),
    (("--trained", "0", "evaluate.filters=no"), "evaluate.filters: expected a whole number"),
    (("evaluate.filters=8", "--steps", "3", "evaluate.epochs=no"), "evaluate.epochs: expected a"),
    (("--image", "2"), "`image` is 2, but cell 4 of 5 halves its input"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_rejected_first(script, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(SCRIPTS.parent)
    for module, name in ((script, "compare"), (script.trained_by_both, "trained_by_both")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("too late"))
    assert run(script, monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("benchmark_interpreter.py: ") and message in err


@pytest.mark.parametrize("error", [FloatingPointError, TooLargeError])
def test_failed_training_is_reported_in_one_line(script, monkeypatch, capsys, error) -> None:
    def train(*_):
        raise error("the loss is nan")

    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.setattr(script.trained_by_both, "train", train)
    assert run(script, monkeypatch, "--architectures", "0") == 1
    assert capsys.readouterr().err == "benchmark_interpreter.py: the loss is nan\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("--steps", 0), ("--trained", 1), ("--trained", -1), ("--first", -1), ("--batch", 0)],
)
def test_useless_counts_are_rejected(script, monkeypatch, capsys, name, value) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(script, monkeypatch, name, str(value))
    assert f"{name} {value}: expected at least" in capsys.readouterr().err
