"""Run `nas search` and `nas export` as a user does."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import fields

import pytest
from paths import REPOSITORY as ROOT
from searches import DATA, HAS_TABLE, NO_TABLE

from gpipe_jax.config.loader import load_as
from gpipe_jax.genotypes.genotype import Genotype
from nas import Search, cli
from nas.config import SearchConfig, TrainingConfig
from nas.training.evaluator import TrainingEvaluator

CONFIG = """\
space: {kind: nasnet, pairs: 3}
evaluate:
  kind: function
  function: mine:evaluate
evolution: {population: 8, sample: 3}
run:
  cycles: 30
"""
MINE = """\
def evaluate(genotype):
    return {"fitness": str(genotype).count("identity") / 10, "pairs": 3}

def text(genotype):
    return "good"

def broken(genotype):
    raise RuntimeError("no accelerator")
"""
KEYS = {
    "best_fitness", "best_metrics", "genotype", "evaluations", "cache_hits", "failures", "wall_s",
    "run",
}  # fmt: skip


@pytest.fixture
def nas(tmp_path, monkeypatch, capsys):
    """`nas(command, ...)` in a folder with mine.yaml and mine.py: (code, lines, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text(MINE)

    def run(*arguments: str):
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return run


def test_a_config_of_the_user_is_not_replaced(nas, tmp_path) -> None:
    """Replace only what a search wrote that ended before it began, for example by a mistake."""
    mistake = ("evolution.population=null", "evolution.replacement=false")
    assert nas("search", "mine.yaml", "run.workdir=a", "evolution.sample=30", *mistake)[0] == 2
    assert nas("search", "mine.yaml", "run.workdir=a", "run.cycles=10")[0] == 0
    (tmp_path / "config.yaml").write_text(CONFIG)
    code, _, err = nas("search", "config.yaml", "run.workdir=.")
    assert code == 2 and "a config.yaml, which the search would replace; use another folder" in err
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    assert nas("search", "config.yaml", "run.cycles=10")[0] == 0


def test_search_export_and_resume(nas, tmp_path) -> None:
    code, lines, _ = nas("search", "mine.yaml", "--json")
    figures = json.loads(lines[-1])
    assert code == 0 and figures.keys() >= KEYS and figures["run"] == "runs/mine"
    assert lines[0].startswith("3/30 results: best ")
    assert figures["evaluations"] + figures["cache_hits"] == 30
    assert figures["best_metrics"] == {"pairs": 3.0}
    assert load_as(SearchConfig, "runs/mine/config.yaml") == load_as(SearchConfig, "mine.yaml")

    code, lines, _ = nas("export", "mine", "--out", "best.json", "--json")
    best = Genotype.from_json((tmp_path / "best.json").read_text())
    assert code == 0 and json.loads(lines[-1])["genotype"] == figures["genotype"]
    assert str(best).count("identity") / 10 == figures["best_fitness"]
    assert nas("export", "runs/mine", "--out", "other.json")[0] == 0

    code, lines, _ = nas("search", "mine.yaml", "run.cycles=40", "--json")
    assert code == 0 and json.loads(lines[-1])["results"] == 40


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("evolution.popluation=9",), ["did you mean 'evolution.population'?"]),
        (("space.kind=nasnett",), ["mine.yaml", "space.kind", "did you mean 'nasnet'?"]),
        (("run.cycles=7",), ["cycles 7 is less than evolution.population 8"]),
        (
            ("evolution.sample=9", "evolution.replacement=false"),
            ["sample 9 is more than population 8, which cannot be drawn without replacement"],
        ),
        (("evaluate.function=mine:what",), ["override", "'mine:what' cannot be imported"]),
        (("evaluate.function=mine",), ["'mine': expected module:name"]),
        (("evaluate={kind: table}",), ["evaluate 'table' has no cells of space 'nasnet'"]),
        (("limits.params_m=1",), ["limits need evaluate.kind table"]),
        (("run.workers=thread",), ["workers 'thread': expected a number of threads, 'devices'"]),
        (("space.operations=[sep_9x9]",), ["override", "got ['sep_9x9']; correct"]),
    ],
)
def test_bad_input(nas, arguments, messages) -> None:
    code, out, err = nas("search", "mine.yaml", *arguments)
    assert (code, out) == (2, []), err
    for message in messages:
        assert message in err


def test_version(nas) -> None:
    code, lines, _ = nas("--version")
    assert code == 0 and lines == [f"nas {importlib.metadata.version('gpipe-jax')}"]


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "nas.cli", "search"], capture_output=True)
    assert done.returncode == 2 and b"required: CONFIG" in done.stderr


def test_errors_name_the_line(nas, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text(CONFIG.replace("cycles: 30", "cycles: many\n  wrokers: 2"))
    code, _, err = nas("search", "bad.yaml")
    assert code == 2 and "2 problems in bad.yaml" in err
    assert "bad.yaml:7: run.cycles: expected a whole number, got 'many'" in err
    assert "bad.yaml:8: unknown key 'run.wrokers'; did you mean 'run.workers'?" in err


def test_another_search_in_the_folder(nas) -> None:
    assert nas("search", "mine.yaml")[0] == 0
    code, _, err = nas("search", "mine.yaml", "evolution.seed=4")
    assert (
        code == 2 and "seed is 0 in the run, 4 here; use another name, or the same settings" in err
    )


def test_another_evaluator_in_the_folder(nas, tmp_path) -> None:
    assert nas("search", "mine.yaml")[0] == 0
    before = (tmp_path / "runs/mine/config.yaml").read_text()
    code, _, err = nas("search", "mine.yaml", "evaluate.function=mine:text", "run.cycles=40")
    assert (
        code == 2 and "evaluate.function is 'evaluate' in the run, 'text' here; use another" in err
    )
    assert (tmp_path / "runs/mine/config.yaml").read_text() == before


def test_an_evaluator_that_fails_is_no_bad_input(nas) -> None:
    code, _, err = nas("search", "mine.yaml", "evaluate.function=mine:broken", "run.workdir=a")
    assert code == 1 and "10 evaluations have failed in a row" in err and "no accelerator" in err
    code, _, err = nas("search", "mine.yaml", "evaluate.function=mine:text", "run.workdir=b")
    assert code == 1 and "returned 'good' (str) as fitness of candidate 0" in err


def test_time_limit_before_the_first_result(nas, tmp_path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef evaluate(g):\n    time.sleep(2)\n")
    arguments = ("run.time_limit_s=0.1", "evaluate.function=slow:evaluate")
    code, _, err = nas("search", "mine.yaml", *arguments)
    assert code == 1 and "runs/mine has no result yet; run the same command again to resume" in err
    assert (tmp_path / "runs" / "mine" / "config.yaml").exists()


def test_a_file_that_is_no_search(nas, tmp_path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "search.sqlite").write_text("no database, but a text" * 100)
    for arguments in (("search", "mine.yaml"), ("report", "mine")):
        code, _, err = nas(*arguments)
        assert code == 2 and "mine/search.sqlite is not a search's file, nor any SQLite" in err


def test_config_is_written_first_and_zero_is_a_fitness(nas, tmp_path) -> None:
    (tmp_path / "sized.py").write_text(
        "import os\ndef evaluate(g):\n    return 0.0 * os.path.getsize('runs/mine/config.yaml')\n"
    )
    code, lines, _ = nas("search", "mine.yaml", "evaluate.function=sized:evaluate")
    assert code == 0 and "results: best 0," in f"{lines[0]}," and "nan" not in "".join(lines)


def test_bad_export(nas, tmp_path) -> None:
    code, _, err = nas("export", "nothing", "--out", "x.json")
    assert code == 2 and "no run 'nothing'" in err
    nas("search", "mine.yaml")
    (tmp_path / "x.json").write_text("mine")
    code, _, err = nas("export", "mine", "--out", "x.json")
    assert code == 2 and "--out x.json: already exists; choose another name" in err
    assert (tmp_path / "x.json").read_text() == "mine"


def test_code_in_a_folder_of_somebody_else_is_asked_for(nas, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    assert nas("search", "mine.yaml")[0] == 0
    assert nas("export", "mine", "--out", "own.yaml")[0] == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody else's"))
    for arguments in (("--out", "a.yaml"), ("--out", "a.json", "--top", "2")):
        code, out, err = nas("export", "mine", *arguments)
        assert (code, out) == (2, []) and "add --trust if you trust the author of the folder" in err
    assert nas("export", "mine", "--out", "b.json")[0] == 0  # which runs no code
    assert nas("export", "mine", "--out", "b.yaml", "--trust")[0] == 0
    assert (tmp_path / "b.yaml").read_text() == (tmp_path / "own.yaml").read_text().replace(
        "own.yaml", "b.yaml"
    )


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; sys.exit(0)", "the module ends raised SystemExit: 0; import it in Python"),
        ("1 / 0", "the module ends raised ZeroDivisionError: division by zero"),
        ("def (", "the module ends raised SyntaxError: "),
    ],
)
def test_a_module_that_cannot_be_imported(nas, tmp_path, code, problem) -> None:
    (tmp_path / "ends.py").write_text(code)
    exit_code, out, err = nas("search", "mine.yaml", "evaluate.function=ends:evaluate")
    assert (exit_code, out) == (2, []) and problem in err


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("search", "mine.yaml", "run.workdir=s3://a/b"), "run.workdir: got 's3://a/b'"),
        (("search", "s3://a/b.yaml"), "`config` s3://a/b.yaml"),
        (("report", "s3://a/b"), "s3://a/b"),
        (("export", "s3://a/b", "--out", "x.json"), "s3://a/b"),
        (("export", "mine", "--out", "s3://a/b"), "--out/-o: s3://a/b"),
    ],
)
def test_addresses_are_no_paths(nas, arguments, place) -> None:
    code, out, err = nas(*arguments)
    assert (code, out) == (2, []) and place in err
    assert "s3:// addresses are not supported; give a path on this machine" in err


def test_the_folder_of_a_search_may_be_in_the_home_folder(nas, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert nas("search", "mine.yaml", "run.workdir=~/a")[0] == 0
    assert (tmp_path / "home" / "a" / "search.sqlite").exists()
    assert nas("report", "~/a")[0] == 0
    with pytest.raises(ValueError, match="`folder` s3://a: s3:// addresses are not supported"):
        Search(space="nasnet", name="x", folder="s3://a")
    code, _, err = nas("search", "mine.yaml", "run.workdir=$NOT_SET_HERE/a")
    assert code == 2 and "variable NOT_SET_HERE is not set; set it, or write the path out" in err


@pytest.mark.skipif(not HAS_TABLE, reason=NO_TABLE)
def test_the_benchmark(nas, pytestconfig) -> None:
    config = pytestconfig.rootpath / "configs" / "nasbench201.yaml"
    # With several workers the children depend on who is done first.
    options = ("limits.params_m=0.7", "run.cycles=150", "run.workers=1", "--json")
    code, lines, _ = nas("search", str(config), f"evaluate.folder={DATA}", *options)
    figures = json.loads(lines[-1])
    assert code == 0 and figures["best_fitness"] > 80 and figures["rejected"] > 0
    assert figures["best_metrics"]["params_m"] <= 0.7
    assert figures["genotype"].startswith("|")


TRAINING = """\
space: {kind: nasnet}
evaluate: {kind: training, data: digits, epochs: 3}
evolution: {population: 4, sample: 2}
run: {cycles: 5}
"""


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluate.batch_size=2000", "batch_size 2000 is more than the 1078 training images"),
        ("evaluate.data=digit", "data: unknown data set 'digit'; did you mean 'digits'?"),
        ("evaluate.final_epochs=9", "final_epochs 9 is more than epochs 3"),
        ("evaluate.builder=dynamic", "expected 'interpreter' or 'static', got 'dynamic'"),
        ("space={kind: nasbench201}", "evaluate 'training' has no cells of space 'nasbench201'"),
    ],
)
def test_bad_training_settings_are_rejected_first(nas, tmp_path, override, problem) -> None:
    (tmp_path / "training.yaml").write_text(TRAINING)
    code, _, err = nas("search", "training.yaml", override)
    assert code == 2 and problem in err
    assert not (tmp_path / "runs").exists()


def test_old_keys_name_the_new_ones(nas, tmp_path) -> None:
    keys = {"cells": "cells_per_stack", "validation": "validation_images"}
    keys["validations"] = "final_epochs"
    old = "evaluate: {kind: training, cells: 1, validation: 9, validations: 1}\n"
    (tmp_path / "old.yaml").write_text(f"space: {{kind: nasnet}}\n{old}")
    code, _, err = nas("search", "old.yaml")
    assert code == 2
    for before, now in keys.items():
        assert f"old.yaml:2: 'evaluate.{before}' is now 'evaluate.{now}'; rename it" in err


@pytest.mark.parametrize("name", ["search_digits", "search_cifar10"])
def test_the_configs_of_real_training_can_be_read(name) -> None:
    config = load_as(SearchConfig, ROOT / "configs" / f"{name}.yaml", [])
    options = config.evaluate.model_dump(exclude={"kind"})
    assert TrainingEvaluator(**options).data == name.removeprefix("search_")
    defaults = {field.name: field.default for field in fields(TrainingEvaluator)}
    theirs = {name: field.default for name, field in TrainingConfig.model_fields.items()}
    assert theirs.pop("kind") == "training"
    assert theirs == {name: defaults[name] for name in theirs}
