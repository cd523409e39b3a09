"""The arithmetic of the script that compares the builders; nothing is compiled."""

import importlib
import math
import sys
from pathlib import Path
from random import Random

import jax
import pytest
import toy

import nas
from nas.training.datasets import Split
from nas.training.network import Shape

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
        "ratio of candidates per hour 1.7; accuracies differ by 0.1000 +- 0.3500, their ranks "
        "correlate -1.000",
    ]


def test_accuracies_that_are_all_alike_have_no_order(script, capsys) -> None:
    found = {"seconds": 60, "train_s": 60, "fitness": 0.1, "compilations": 3}
    rows = [
        {"interpreter": found, "static": found | {"fitness": fitness}} for fitness in (0.1, 0.2)
    ]
    figures = script.trained_by_both.summary(rows)
    assert figures["rank_correlation"] is None
    script.report_trained(figures, 2)
    assert capsys.readouterr().out.endswith("their ranks correlate undefined\n")


def test_in_float64_the_static_builder_is_the_measure_of_both(script, capsys) -> None:
    losses = {"interpreter": (1 + 1e-7, 1.5, 0.5), "static": (1.0, 1.0, 0.5), "itself": (1, 1, 0.4)}
    rows = [
        {
            name: {"fitness": 2 * i + found[i], "train_loss": found[i]}
            for name, found in losses.items()
        }
        for i in range(3)
    ]
    script.trained_in_float64.report({"rows": rows, **script.trained_by_both.alike(rows)})
    assert capsys.readouterr().out == (
        "3 candidates trained in float64: mean accuracy, interpreter 3.0000, static 2.8333; they "
        "differ by 0.1667 +- 0.1667, their ranks correlate 1.000; the last losses of 2 are the "
        "same to 1e-6, of the static program and itself 2\n"
    )


def test_in_float64_all_that_is_trained_is_float64(script, monkeypatch) -> None:
    module, evaluator = script.trained_in_float64, toy.toy()
    with jax.enable_x64():
        split = Split(*module.doubled(tuple(evaluator.data_fits())))
        assert split.images.dtype == "float64" and split.labels.dtype == "int32"
        network = toy.Toy(Shape(1, 1, 8, 1, 10, dtype="float64"))
        one = network.encode(toy.job().architecture)
        run = module.in_double(evaluator, network, split)
        values = module.doubled(network.init(one, jax.random.key(0)))
        found = run(one, values, 0)
        assert run(one, values, 0) == found
        inner = [a.parameters["inner"] for a in (module.in_the_last_digit(values), values)]
        assert 0 < abs(inner[0] - inner[1]).max() < 3e-16 * abs(inner[1]).max()
        moved = jax.tree.map(lambda a: a * (1 + 1e-10), values)  # which float32 does not see
        apart = abs(run(one, moved, 0)["train_loss"] - found["train_loss"])
    assert found["fitness"] > 0.1
    assert 0 < apart < 1e-8


def run(script, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark_interpreter.py", *arguments])
    return script.main()


def test_what_is_trained_is_of_the_space_of_the_config(script, monkeypatch) -> None:
    def one(evaluators, network, number, genotype):
        trained.append(genotype)
        found = {"seconds": 1, "train_s": 1, "fitness": number, "compilations": 3}
        return dict.fromkeys(evaluators, found)

    trained = []
    monkeypatch.setattr(script.trained_by_both, "one", one)
    small = ("space.pairs=2", "space.operations=[sep_3x3, conv_1x1]")
    config = ("--config", str(SCRIPTS.parent / "configs" / "search_digits.yaml"), *small)
    assert run(script, monkeypatch, "--architectures", "0", "--trained", "3", *config) == 0
    space = nas.NASNetSpace(2, ("sep_3x3", "conv_1x1"))
    assert trained == [space.random(Random(seed)) for seed in range(3)]


CONFIGS = SCRIPTS.parent / "configs"
BAD = [
    (("--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
    (("--config", str(CONFIGS / "nasbench201.yaml")), "evaluate.kind table: both builders train; "),
    (("evaluate={kind: function}",), "evaluate.kind function: both builders train; use training"),
    (("evaluate.epochs=no",), "evaluate.epochs: expected a whole number"),
    (("evaluate.batch_size=2000",), "batch_size 2000 is more than the 512 training images of"),
    (("evaluate.filters=1",), "`filters` is 1, but the narrowest cell needs 2 features"),
    (("--image", "2"), "`image` is 2, but cell 4 of 5 halves its input"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_known_before_anything_is_measured(
    script, monkeypatch, capsys, arguments, message
) -> None:
    monkeypatch.chdir(SCRIPTS.parent)
    for module, name in ((script, "compare"), (script.trained_by_both, "trained_by_both")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("too late"))
    assert run(script, monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("benchmark_interpreter.py: ") and message in err


def test_a_training_that_diverges_is_said_in_a_line(script, monkeypatch, capsys) -> None:
    def one(*_):
        raise FloatingPointError("the loss is nan")

    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.setattr(script.trained_by_both, "one", one)
    assert run(script, monkeypatch, "--architectures", "0") == 1
    assert capsys.readouterr().err == "benchmark_interpreter.py: the loss is nan\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("--steps", 0), ("--trained", 1), ("--trained", -1), ("--architectures", -1), ("--batch", 0)],
)
def test_counts_of_which_nothing_comes_are_refused(
    script, monkeypatch, capsys, name, value
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(script, monkeypatch, name, str(value))
    assert f"{name} {value}: expected at least" in capsys.readouterr().err
