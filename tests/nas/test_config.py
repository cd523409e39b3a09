"""Check settings of a search: defaults that depend on others, and dicts of metrics."""

from pathlib import Path

import pytest

from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from nas import cli
from nas.config import SearchConfig
from nas.storage.reader import Reader

CONFIG = """
space: {kind: nasnet, pairs: 2}
evaluate: {kind: function, function: "scores:score"}
run:
  cycles: 40
"""
SCORES = """
number = 3

class Scores:
    def evaluate(self, job):
        return 1.0

def score(genotype):
    size = len(str(genotype))
    return {"fitness": size % 97, "energy": size % 13, "results": 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "scores.py").write_text(SCORES)
    return tmp_path


def load(*overrides: str) -> SearchConfig:
    return loader.load_as(SearchConfig, "mine.yaml", overrides)


def test_a_short_search_needs_no_population(folder, capsys) -> None:
    assert cli.main(["search", "mine.yaml"]) == 0
    study = Reader(folder / "runs" / "mine").study()
    assert (study.settings["population"], study.settings["sample"]) == (20, 5)
    shown = capsys.readouterr().out
    assert "40/40 results" in shown and "metric results  1" in shown
    assert cli.main(["search", "mine.yaml", "run.cycles=120"]) == 0
    assert Reader(folder / "runs" / "mine").counts().results == 120


def test_a_budget_of_evaluations(folder, capsys) -> None:
    overrides = ["run.cycles=null", "run.evaluations=30"]
    assert cli.main(["search", "mine.yaml", *overrides]) == 0
    assert "30/30 evaluations: best" in capsys.readouterr().out
    assert Reader(folder / "runs" / "mine").counts().evaluations == 30


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("evolution.population=50",),
            "run.cycles: cycles 40 is less than evolution.population 50: evolution begins when",
        ),
        (
            ("evolution.population=20", "run.evaluations=10"),
            "run.evaluations: evaluations 10 is less than evolution.population 20: evolution",
        ),
        (("run.evaluations=0",), "run.evaluations: expected at least 1, got 0"),
        (
            ("run.directions={energy: mn}",),
            "run.directions: 'mn' of 'energy' is unknown; did you mean 'min'?",
        ),
        (("run.directions=[energy]",), "run.directions: expected the names of metrics, each with"),
        (
            ("run.directions={fitness: min}",),
            "run.directions: 'fitness' is not another metric, so it cannot have",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(folder, overrides, problem) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("number", "evaluate 3: expected a function of an architecture, or an object"),
        ("Scores", "evaluate is the class Scores: expected an object of it, such as Scores()"),
    ],
)
def test_a_function_that_is_none_is_bad_input(folder, capsys, name, problem) -> None:
    override = f"evaluate.function=scores:{name}"
    assert cli.main(["search", "mine.yaml", override]) == 2
    message = capsys.readouterr().err
    assert f"override '{override}': evaluate: `function` 'scores:{name}': " in message
    assert problem in message and not (folder / "runs").exists()


def test_a_random_search_may_be_shorter_than_its_population(folder) -> None:
    assert load("evolution.population=50", "evolution.algorithm=random").run.cycles == 40


def test_directions_of_a_config_are_those_of_the_run(folder) -> None:
    assert cli.main(["search", "mine.yaml", "run.directions={energy: max}"]) == 0
    assert Reader(folder / "runs" / "mine").study().directions == {"energy": "max"}
