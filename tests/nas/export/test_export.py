"""Test the exported config: gpipe accepts it, and it is the best candidate's."""

import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import yaml

import nas
from gpipe_jax.config import loader
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.training import from_config
from nas import cli
from nas.errors import ExportOptionError
from nas.export import export as exporting
from nas.export import scaled_config
from nas.export.export import ExportOptions
from nas.pickles.setup import Setup
from nas.storage import finals_file

SMALL = ("--cells-per-stack", "1", "--filters", "4")
SPACE = nas.NASNetSpace(pairs=2, operations=("sep_3x3", "max_pool_3x3", "identity"))


def run(folder, evaluator, space=SPACE, name: str = "searched", cycles: int = 8) -> nas.Result:
    """Run a search whose fitness follows from the number: later even candidates are better."""
    setup = Setup(space, evaluator, (), {}).pickled()
    options = {"population": 8, "sample": 2, "cycles": cycles, "folder": folder, "name": name}
    with nas.Search(space=space, setup=setup, **options) as search:
        while (job := search.ask()) is not None:
            search.tell(job, {"fitness": job.candidate / 10 - job.candidate % 2, "loss": 1.0})
    return nas.load(name, folder)


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """`export(...)` in a folder with runs/: (code, lines, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str):
        code = cli.main(["export", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return command


def test_config_of_the_winner_has_the_search_data(export, tmp_path) -> None:
    result = run("runs", nas.TrainingEvaluator(data="digits"))
    sizes = ("--cells-per-stack", "2", "--filters", "16", "--stages", "4")
    code, lines, _ = export("searched", "--out", "best.yaml", *sizes, "--json")
    config, figures = loader.load("best.yaml"), json.loads(lines[-1])
    assert code == 0 and figures["candidate"] == 6 and figures["out"] == "best.yaml"
    genotype = Genotype.from_json(config.model.genotype)
    assert (
        genotype == result.best.architecture == Genotype.from_json(json.dumps(figures["genotype"]))
    )
    assert (config.model.layers, config.model.filters, config.model.stem) == (6, 16, "cifar")
    assert (config.data.kind, config.mesh.stages, config.mesh.simulate) == ("digits", 4, 4)
    assert (config.pipeline.partition, config.pipeline.schedule) == ("auto", "eager_1f1b")
    assert len(from_config.network(config.model)) == 6 + 2 + 2
    text = (tmp_path / "best.yaml").read_text()
    assert (
        "# The best candidate of the search searched, #6 (fitness 0.6), scaled up: 6" in text
        and "(N = 2)" in text
    )
    assert "#   gpipe train best.yaml\n" in text and max(map(len, text.splitlines())) <= 100


def test_without_training_the_paper_is_followed(export) -> None:
    run("runs", lambda genotype: 1.0)
    assert export("searched", "--out", "best.yml")[0] == 0
    config = loader.load("best.yml")
    assert (config.data.kind, config.model.image, config.model.auxiliary_weight) == (
        "cifar10", 32, 0.5
    )  # fmt: skip
    assert (config.model.layers, config.model.filters, config.train.steps) == (18, 32, 234_600)
    assert (config.optimizer.kind, config.optimizer.schedule) == ("sgd", "cosine")


def test_on_a_file_of_arrays(export, tmp_path) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(640, 12, 12, 2)).astype(np.float32)
    path = str(tmp_path / "mine #1: all.npz")
    np.savez(path, inputs=images, labels=np.arange(640, dtype=np.int32) % 3)
    some = nas.TrainingEvaluator(data=path, examples=100)
    run("runs", nas.Repeated(some, 2))
    code, _, err = export("searched", "--out", "best.yaml", *SMALL)
    assert code == 0, err
    config = loader.load("best.yaml")
    model = config.model
    assert (model.image, model.in_channels, model.classes, model.auxiliary_weight) == (12, 2, 3, 0)
    assert config.data.train == path
    assert config.train.steps == 600 * 5  # epochs of all that `gpipe train` trains on, 576 images
    batch = from_config.example(config)["inputs"]
    assert batch.shape == (128, 12, 12, 2) and config.mesh.simulate is None


def test_on_few_examples(export, tmp_path) -> None:
    """Check that the batch is no larger than the data."""
    few = {"inputs": np.zeros((120, 8, 8, 1), np.float32), "labels": np.arange(120) % 3}
    np.savez(tmp_path / "few.npz", **few)
    some = nas.TrainingEvaluator(data=str(tmp_path / "few.npz"), batch_size=16)
    run("runs", nas.Repeated(some, 2))
    assert export("searched", "--out", "best.yaml", *SMALL)[0] == 0
    config = loader.load("best.yaml")
    assert next(from_config.dataset(config).train(0))["inputs"].shape == (104, 8, 8, 1)


NASTY = (
    "my #1/a.npz", "a: b.npz", "*.npz", "yes", "null", "007", "1e3", "2026-11-24", "- a", "{a}",
    "it's", 'a "b"', " a ", "a\nb", "\u00e9 \U0001f600", "&a", "!a", "%a", "@a", "~", "",
    "a" * 200 + " b",
)  # fmt: skip


def test_written_configs_load_unchanged(tmp_path) -> None:
    """Also texts that mean something else in YAML, or numbers that do not."""
    for written in NASTY:
        config = {
            "model": {
                "kind": "amoebanet",
                "genotype": GENOTYPES["D"].to_json(),
                "label_smoothing": 1e-5,
            },
            "data": {"kind": "arrays", "train": written},
            "mesh": {"stages": 4, "simulate": 4},
            "pipeline": {"partition": "auto"},
            "train": {"steps": 3},
        }
        text = scaled_config.text(config, "A title.", "A note.", "my #1\nbest.yaml")
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        assert yaml.safe_load(text) == config
        if written:
            assert loader.load(path) == loader.load(config)
            path.write_text(loader.dump(loader.load(config)), encoding="utf-8")
            assert loader.load(path) == loader.load(config)


def test_the_best_are_trained_again_and_ranked(export, monkeypatch) -> None:
    def evaluate(self, job: nas.Job) -> dict:
        trained.append((job.candidate, self.epochs, self.stop_epoch))
        if len(trained) == 2 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        if job.candidate == 2:
            raise FloatingPointError("nan")
        return {"fitness": 1 / (1 + job.candidate), "train_loss": 0.5}

    trained, interrupted = [], []
    monkeypatch.setattr(nas.TrainingEvaluator, "evaluate", evaluate)
    run("runs", nas.TrainingEvaluator(data="digits", epochs=5, stop_epoch=2))
    again = ("searched", "--out", "best.json", "--top", "3", "--json")
    assert export(*again)[0] == 130  # and what was trained is kept
    code, lines, _ = export(*again)
    assert code == 0 and trained == [(6, 15, None), (4, 15, None), (4, 15, None), (2, 15, None)]
    figures = json.loads(lines[-1])
    assert [(each["candidate"], each["again"]) for each in figures["ranking"]] == [
        (4, 1 / 5), (6, 1 / 7), (2, None)
    ]  # fmt: skip
    assert "#6: fitness 0.6, trained again 0.142857" in lines
    assert "#2: fitness 0.2, trained again failed" in lines
    architecture = nas.load("searched").candidate(4).architecture
    with open("best.json") as file:
        assert Genotype.from_json(file.read()) == architecture and figures["candidate"] == 4
    assert export("searched", "-o", "new.yaml", "--top", "3", "--epochs", "7")[0] == 0
    assert trained[4:] == [(6, 7, None), (4, 7, None), (2, 7, None)]
    assert len(json.loads((nas.load("searched").path / finals_file.FILE).read_text())) == 4


def test_a_report_has_what_was_trained_again(export, tmp_path, capsys, monkeypatch) -> None:

    def fitness(self, job: nas.Job) -> dict:
        return {"fitness": 100 * job.candidate + self.epochs}

    monkeypatch.setattr(nas.TrainingEvaluator, "evaluate", fitness)
    result = run("runs", nas.TrainingEvaluator(data="digits", epochs=5))

    def report() -> tuple[str, dict]:
        assert cli.main(["report", "searched", "--json"]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return "\n".join(lines), json.loads(last)

    text, figures = report()
    assert "trained again" not in text and figures["trained_again"] == []
    assert export("searched", "-o", "best.json", "--top", "2")[0] == 0
    assert export("searched", "-o", "new.json", "--top", "2", "--epochs", "7")[0] == 0
    text, figures = report()
    assert [tuple(each.values()) for each in figures["trained_again"]] == [
        (6, 15, 615), (6, 7, 607), (4, 15, 415), (4, 7, 407)
    ]  # fmt: skip
    table = text[text.index("\ntrained again\n") :].split("\n\n")[0].splitlines()[2:]
    assert [row.split() for row in (table[0], table[2])] == [
        ["candidate", "epochs", "fitness"], ["#6", "15", "615"]
    ]  # fmt: skip
    assert "trained again</caption>" in (result.path / "report.html").read_text(encoding="utf-8")


def test_failed_finalists_are_reported_and_retried(export, tmp_path, monkeypatch) -> None:
    def evaluate(self, job: nas.Job) -> dict:
        assert self.timeout_s is None
        if not fixed:
            raise FloatingPointError(f"no loss of #{job.candidate}")
        return {"fitness": 0.5}

    fixed = []
    monkeypatch.setattr(nas.TrainingEvaluator, "evaluate", evaluate)
    run("runs", nas.TrainingEvaluator(data="digits", timeout_s=1.0))
    again = ("searched", "-o", "best.json", "--top", "2")
    code, _, err = export(*again)
    assert code == 2 and not (tmp_path / "best.json").exists()
    assert "--top 2: all 2 candidates failed when they were trained again; the last error:" in err
    assert "FloatingPointError: no loss of #4. Fix this error" in err
    fixed.append(True)
    assert export(*again)[0] == 0


def test_what_the_search_trained_on_is_not_guessed(export, tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text("def evaluate(genotype):\n    return 1.0\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run("runs", importlib.import_module("theirs").evaluate)
    del sys.modules["theirs"]
    code, _, err = export("searched", "-o", "best.yaml")
    assert code == 2 and "does not have `evaluate` of the search (ModuleNotFoundError: No" in err
    assert export("searched", "-o", "best.json")[0] == 0


def test_only_declared_wrappers_are_removed(tmp_path) -> None:
    training = nas.TrainingEvaluator(data="digits", filters=4)
    result = run(tmp_path, nas.Repeated(nas.Repeated(training, 2), 2), name="repeated")
    assert exporting._evaluator(result) == training
    result = run(tmp_path, HasEvaluator(training), name="another")
    assert isinstance(exporting._evaluator(result), HasEvaluator)


class HasEvaluator(nas.Evaluator):
    """Have an attribute of that name, which `nas export` must not take for its own."""

    def __init__(self, evaluator) -> None:
        self.evaluator = evaluator


BAD = [
    (("-o", "there.yaml"), "--out there.yaml: already exists; choose another name"),
    (("-o", "no/best.yaml"), "--out no/best.yaml: the folder no does not exist; create it"),
    (
        ("-o", "b.yaml", "--top", "2"),
        "--top 2: only a search by real training can train its candid",
    ),
    (("-o", "b.yaml", "--top", "0"), "--top 0: must be a whole number of at least 1"),
    (("-o", "b.yaml", "--epochs", "0"), "--epochs 0: must be a whole number of at least 1"),
    (
        ("-o", "b.yaml", "--epochs", "9"),
        "--epochs 9: candidates are trained again only if `top` is at",
    ),
    (("-o", "b.yaml", "--cells-per-stack", "0"), "--cells-per-stack 0: must be a whole number"),
    (("-o", "b.yaml", "--filters", "1"), "`filters` is 1, but the narrowest cell needs 2"),
    (
        ("-o", "b.yaml", "--cells-per-stack", "1", "--stages", "9"),
        "--stages 9: a network with cells_per_stack 1 has 8 layers",
    ),
]


@pytest.mark.parametrize(
    ("out", "kind"), [("there.json", FileExistsError), ("no/best.json", FileNotFoundError)]
)
def test_problems_of_the_output_file_are_os_errors(tmp_path, out, kind) -> None:
    result = run(tmp_path, lambda genotype: 1.0)
    (tmp_path / "there.json").touch()
    with pytest.raises(kind, match=r"`out` .*: (already exists|the folder)") as caught:
        exporting.export(result, ExportOptions(tmp_path / out))
    assert isinstance(caught.value, ExportOptionError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.option == "out"


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_exported(export, tmp_path, arguments, message) -> None:
    run("runs", lambda genotype: 1.0)
    (tmp_path / "there.yaml").write_text("mine")
    code, _, err = export("searched", *arguments)
    assert code == 2 and message in err
    assert not (tmp_path / "b.yaml").exists() and (tmp_path / "there.yaml").read_text() == "mine"


def test_the_old_option_names_the_new_one(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["export", "searched", "-o", "b.yaml", "--cells", "18"])
    assert error.value.code == 2
    assert "--cells was renamed to --cells-per-stack" in capsys.readouterr().err


def test_cells_of_another_space_cannot_be_scaled_up(export) -> None:
    run("runs", lambda cell: 1.0, nas.NASBench201Space())
    code, _, err = export("searched", "-o", "best.yaml")
    assert code == 2 and "searched the space 'nasbench201', but only cells of nasnet can be" in err
    assert export("searched", "-o", "best.json")[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train", "train.steps=4", "optimizer.warmup_steps=1"), {"steps": 4}),
        (("plan", "--topology", "v5e:2x2"), {"fits": True, "topology": "v5e:2x2"}),
        (
            ("plan", "mesh.data=4", "mesh.simulate=16", "--topology", "v5e:4x4"),
            {"fits": True, "topology": "v5e:4x4"},
        ),
    ],
)
def test_what_is_exported_is_trained_and_planned(export, command, expected) -> None:
    """In four stages on simulated devices, and by the TPU compiler."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'gpipe-jax[tpu]'")
    run("runs", nas.TrainingEvaluator(data="digits"))
    assert export("searched", "-o", "best.yaml", *SMALL)[0] == 0
    name, *options = command
    done = subprocess.run(
        [sys.executable, "-m", "gpipe_jax", name, "best.yaml", *options, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures == {**figures, **expected}
