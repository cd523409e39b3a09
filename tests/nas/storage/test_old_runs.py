"""Read, resume, report and export runs that version 0.1 wrote, before modules moved to rooms."""

import gzip
import io
import json
import pickle
import sqlite3
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import nas
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from nas import cli
from nas.errors import MismatchError
from nas.pickles import setup as pickled_setup
from nas.pickles.setup import load_setup
from nas.reports import html, plots
from nas.reports.report import report
from nas.storage import finals_file, old_names
from nas.storage.reader import Reader

# `search.sqlite` of this search by version 0.1, of 8 cycles, whose evaluator was `evaluate` below:
#
#     costs = nas.NetworkCosts(cells=1, filters=4)
#     training = nas.TrainingEvaluator(
#         data="digits", cells=1, filters=4, epochs=3, validations=2, validation=200)
#     nas.search(
#         space=nas.NASNetSpace(), evaluate=nas.Repeated(training, 2), population=4, sample=2,
#         cycles=8, seed=3, name="first", limits=[nas.Limit("params_m", costs.params_m, 5.0)],
#         retries=nas.Retries(exception=2))
#
# and the setup of a search of NAS-Bench-201 by a table, with a limit of `nas search`.
OLD_RUNS = Path(__file__).parent / "old_runs"


def evaluate(self, job: nas.Job) -> dict:
    """Replace the training; the fitness depends on the architecture and the seed."""
    cells = (job.architecture.normal, job.architecture.reduction)
    operations = [name for cell in cells for pair in cell.pairs for name, _ in pair]
    count = operations.count("identity")
    return {"fitness": 0.1 * count + job.seed % 97 / 1000, "parameters": 100.0 + count}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return the folder of an old run named `first`."""
    monkeypatch.setattr(nas.TrainingEvaluator, "evaluate", evaluate)
    (tmp_path / "first").mkdir()
    file = gzip.decompress((OLD_RUNS / "search.sqlite.gz").read_bytes())
    (tmp_path / "first" / "search.sqlite").write_bytes(file)
    return tmp_path


def resume_as_before(
    folder: Path, make: type[nas.TrainingEvaluator] = nas.TrainingEvaluator, **fields: Any
) -> nas.Result:
    costs = nas.NetworkCosts(cells_per_stack=1, filters=4)
    values = {"cells_per_stack": 1, "final_epochs": 2, "validation_images": 200, **fields}
    training = make(data="digits", filters=4, epochs=3, **values)
    return nas.search(
        space=nas.NASNetSpace(), evaluate=nas.Repeated(training, 2), population=4, sample=2,
        cycles=10, seed=3, name="first", folder=folder,
        limits=[nas.Limit("params_m", costs.params_m, 5.0)],
    )  # fmt: skip


def test_an_old_run_is_read(folder) -> None:
    result = nas.load("first", folder)
    assert result.study.package == "0.1.0" and result.counts.results == 8
    assert len(result.history) == 8 and result.best.fitness == result.history["fitness"].max()
    assert result.study.evaluator["evaluator"]["final_epochs"] == 2
    assert result.study.limits[0]["cells_per_stack"] == 1
    nas.replay(result.reader, result.space)


def test_an_old_run_is_reported_and_exported(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    reader = Reader(folder / "first")
    assert "best candidates" in str(report(reader))
    assert "The best candidate" in html.page(reader)
    plots.overview(reader, folder / "plots.png")
    assert cli.main(["export", "first", "--out", "best.json"]) == 0
    genotype = json.loads((folder / "best.json").read_text())
    assert (
        nas.NASNetSpace().decode(json.dumps(genotype))
        == nas.load(folder / "first").best.architecture
    )


def test_an_old_run_is_resumed_by_its_own_setup(folder) -> None:
    with pytest.raises(ValueError, match=r"holds code \(evaluate, limits\) that you have"):
        nas.load("first", folder).resume(cycles=12)
    result = nas.load("first", folder, trust=True).resume(cycles=12)
    assert result.counts.results == 12 and result.counts.failures == 0
    assert result.study.evaluator["evaluator"]["cells_per_stack"] == 1
    nas.replay(result.reader, result.space)
    setup = load_setup(result.reader)
    assert setup.options["retries"] == nas.Retries(exception=2)
    assert setup.evaluate.evaluator.final_epochs == 2
    assert setup.evaluate.evaluator.validation_images == 200
    assert setup.limits[0].measure.__self__ == nas.NetworkCosts(cells_per_stack=1, filters=4)


def test_an_old_run_is_resumed_by_the_same_search(folder) -> None:
    assert resume_as_before(folder).counts.results == 10


def test_an_old_run_is_not_resumed_by_another_evaluator(folder) -> None:
    with pytest.raises(MismatchError, match=r"cells_per_stack is 1 in the run, 2 here"):
        resume_as_before(folder, cells_per_stack=2)


@dataclass(frozen=True)
class Tuned(nas.TrainingEvaluator):
    """Add a field to the evaluator that trains."""

    warmth: float = 0.5


def store_another_class(folder: Path) -> None:
    """Let the old run be one of `Tuned`: version 0.1 stored the class's name, and all fields."""
    with sqlite3.connect(folder / "first" / "search.sqlite") as connection:
        (text,) = connection.execute("SELECT settings FROM study").fetchone()
        settings = json.loads(text)
        settings["evaluate"]["evaluator"] |= {"kind": "Tuned", "warmth": 0.5}
        connection.execute("UPDATE study SET settings = ?", (json.dumps(settings),))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("cells_per_stack", 1, 2), ("validation_images", 200, 100), ("final_epochs", 2, 1)],
)
def test_an_old_run_of_a_subclass_is_not_resumed_with_other_values(folder, name, old, new) -> None:
    store_another_class(folder)
    with pytest.raises(MismatchError, match=rf"{name} is {old} in the run, {new} here"):
        resume_as_before(folder, Tuned, **{name: new})
    assert resume_as_before(folder, Tuned).counts.results == 10


def test_own_names_of_an_evaluator_are_not_renamed() -> None:
    mine = {"kind": "Mine", "cells": 3, "validation": "by hand"}
    assert old_names.current_evaluator(mine) == mine
    both = {name: 1 for name in (*old_names._COSTS, "cells_per_stack")}
    assert old_names.current_limit(both) == both


@dataclass(frozen=True)
class TrainingWithCells(nas.TrainingEvaluator):
    """Have a field of an old name."""

    cells: int = 7


@dataclass(frozen=True)
class CostsWithCells(nas.NetworkCosts):
    """Have a field of an old name."""

    cells: int = 7


@pytest.mark.parametrize("make", [TrainingWithCells, CostsWithCells])
def test_a_field_of_a_subclass_with_an_old_name_is_pickled(make) -> None:
    value = make(cells_per_stack=2, cells=9)
    copy = pickle.loads(pickle.dumps(value))
    assert copy == value and (copy.cells_per_stack, copy.cells) == (2, 9)
    old_state = {"cells": 9}
    copy.__setstate__(old_state)
    assert copy.cells == 9


def test_a_setup_whose_classes_are_gone_is_refused_with_a_remedy(folder) -> None:
    with sqlite3.connect(folder / "first" / "search.sqlite") as connection:
        connection.execute("UPDATE study SET setup = ?", (b"cnas.space\nGone\n.",))
    result = nas.load("first", folder, trust=True)
    with pytest.raises(ValueError, match=r"Gone.*give the evaluator again, resume\(evaluate=\.\."):
        result.resume(cycles=9)
    assert resume_as_before(folder).counts.results == 10


def test_a_setup_with_a_table_is_unpickled() -> None:
    pickled = gzip.decompress((OLD_RUNS / "setup_of_a_table.pickle.gz").read_bytes())
    setup = pickled_setup._Unpickler(io.BytesIO(pickled)).load()
    assert isinstance(setup, pickled_setup.Setup)
    assert isinstance(setup.space, nas.NASBench201Space)
    assert setup.evaluate.identity == {"fitness": "test200", "dataset": "cifar10"}
    assert isinstance(setup.evaluate.table, nas.NASBench201Table)
    assert setup.limits[0].measure.name == "params_m"
    assert setup.options["space"] == next(iter(GENOTYPES.values()))
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(pickled)


def test_every_translated_name_exists() -> None:
    for module in old_names.MODULES.values():
        assert __import__(module)
    for module, name in old_names.CLASSES.values():
        assert hasattr(__import__(module, fromlist=[name]), name)
    for kind, names in old_names.FIELDS.items():
        assert set(names.values()) <= {field.name for field in fields(getattr(nas, kind))}


def test_results_of_old_rankings_are_found_by_their_new_keys(tmp_path) -> None:
    old = {"kind": "TrainingEvaluator", "data": "digits", "cells": 1, "validations": 3}
    path = tmp_path / finals_file.FILE
    path.write_text(json.dumps({f"#4, {json.dumps(old)}": {"fitness": 1.0}, "#5, by hand": {}}))
    new = {"kind": "TrainingEvaluator", "data": "digits", "cells_per_stack": 1, "final_epochs": 3}
    assert list(finals_file.read_entries(path)) == [finals_file.key_of(4, new), "#5, by hand"]
