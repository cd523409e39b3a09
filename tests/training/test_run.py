"""Whole runs: what they write, and that an interrupted one ends as if it had not been."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import gpipe_jax as gpipe
from gpipe_jax import errors
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.export import export
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.distributed.preemption import handle_signals
from gpipe_jax.errors import ConfigError, DataError, DivergedError, StoppedError
from gpipe_jax.partition import costs
from gpipe_jax.training import from_config, metrics, run
from gpipe_jax.training.fitting.steps_in_flight import IN_FLIGHT

STEPS = 11
CONFIG = {
    "model": {"kind": "mlp", "features": [64, 12, 12, 10]},
    "data": {"kind": "digits", "batch_size": 24},
    "mesh": {"stages": 2},
    "pipeline": {"micro_batches": 2},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
    "train": {"steps": STEPS, "eval_every": 4, "log_every": 3},
}


def assemble(workdir, *overrides: str) -> from_config.Assembly:
    return from_config.assemble(gpipe.load(CONFIG, overrides), workdir)


def records_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.endswith("_s")} for r in records]


def saved(workdir, step: int) -> dict[str, bytes]:
    """Return a checkpoint's files by name, without the manifest, which has the folder's name."""
    files = (workdir / "checkpoints" / str(step) / "state").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def latest_step(workdir) -> int | None:
    return max(checkpoint_manifest.steps(epath.Path(workdir) / "checkpoints"), default=None)


class Interrupted(BaseException):
    """End a run as a kill does: nothing is saved."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run from beginning to end; return (assembly, summary, records shown)."""
    assembly, shown = assemble(tmp_path_factory.mktemp("a run") / "whole"), []
    return assembly, run.train(assembly, shown.append), shown


# --- what a run writes ---------------------------------------------------------------------------


def test_every_record_is_shown_and_every_third_written(whole):
    assembly, _, shown = whole
    steps = [r["step"] for r in shown if "loss" in r]
    assert steps == list(range(1, STEPS + 1))
    written = records_of(assembly.workdir)
    assert [r["step"] for r in written if "loss" in r] == [1, 3, 6, 9]
    assert [r["step"] for r in written if "test_loss" in r] == [4, 8, STEPS]
    assert [r["step"] for r in written] == sorted(r["step"] for r in written)
    assert all(r in shown for r in written)
    assert set(written[0]) == {"step", "loss", "accuracy", "step_time_s"}
    assert all(r["step_time_s"] > 0 for r in written if "loss" in r)


def test_the_summary(whole):
    assembly, summary, shown = whole
    figures = summary.figures
    assert figures["test_loss"] == shown[-1]["test_loss"]
    assert figures["test_accuracy"] == shown[-1]["test_accuracy"]
    assert (figures["steps"], figures["stages"]) == (STEPS, 2)
    assert figures["bubble_fraction"] == pytest.approx(1 / 3)
    assert figures["workdir"] == str(assembly.workdir)
    assert 0 < figures["step_time_s"] < figures["wall_s"]
    assert summary.note == f"curves: {assembly.workdir / 'curves.png'}"
    assert len((assembly.workdir / "curves.png").read_bytes()) > 5000


def test_the_two_newest_checkpoints_are_kept(whole):
    folder = whole[0].workdir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [str(STEPS), "8"]


def test_the_saved_config_is_that_of_the_run(whole):
    """Name the run's own folder, so that `gpipe train WORKDIR/config.yaml` continues the run."""
    assembly = whole[0]
    config = gpipe.load(assembly.workdir / "config.yaml")
    assert config.train.workdir == str(assembly.workdir)
    back = config.train.model_copy(update={"workdir": None})
    assert config.model_copy(update={"train": back}) == assembly.config


def test_evaluate_repeats_the_last_evaluation(whole):
    assembly, summary, _ = whole
    again = run.evaluate(assembly)
    for name in ("test_loss", "test_accuracy", "steps", "step_time_s"):
        assert again.figures[name] == summary.figures[name]
    assert again.note == f"checkpoint: step {STEPS}"


def test_evaluate_on_other_stages(whole):
    """Count the same network, however it is cut."""
    other = assemble(whole[0].workdir, "mesh.stages=1", "pipeline.micro_batches=1")
    found = run.evaluate(other).figures
    assert found["test_loss"] == pytest.approx(whole[1].figures["test_loss"], rel=1e-5)
    assert found["stages"] == 1


# --- continuing ----------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_if_it_had_not_been(whole, tmp_path):
    """Cut off after the first checkpoint, and again after the second, with half a line written."""
    assembly, reference, _ = whole
    workdir = tmp_path / "interrupted"
    again = assembly._replace(workdir=epath.Path(workdir))
    for last in (6, 10):

        def show(record, last=last):
            if record["step"] == last and "loss" in record:
                raise Interrupted

        with pytest.raises(Interrupted):
            run.train(again, show)
        assert latest_step(workdir) == last // 4 * 4
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
    shown: list[dict] = []
    summary = run.train(again, shown.append)
    assert shown[0]["step"] == 9, "it continues from step 8"
    assert len(saved(workdir, STEPS)) == 4 and saved(workdir, STEPS) == saved(
        assembly.workdir, STEPS
    )
    expected, resumed = (without_times(records_of(w)) for w in (assembly.workdir, workdir))
    assert resumed == expected
    assert summary.figures["test_loss"] == reference.figures["test_loss"]


def test_a_finished_run_only_repeats_its_summary(whole):
    assembly, reference, _ = whole
    before = (assembly.workdir / "metrics.jsonl").read_bytes()
    shown: list[dict] = []
    summary = run.train(assembly, shown.append)
    assert not shown and summary.note == reference.note
    ignored = {"wall_s", "compile_s", "data_s", "checkpoint_s", "evaluation_s"}
    assert {k: v for k, v in summary.figures.items() if k not in ignored} == {
        k: v for k, v in reference.figures.items() if k not in ignored
    }
    assert (assembly.workdir / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_without_its_metrics_knows_its_evaluation(whole):
    assembly, reference, _ = whole
    path = assembly.workdir / "metrics.jsonl"
    before = path.read_bytes()
    path.unlink()
    try:
        summary = run.train(assembly, lambda record: None)
    finally:
        path.write_bytes(before)
    assert summary.figures["test_loss"] == reference.figures["test_loss"]
    assert summary.figures["step_time_s"] is None
    assert summary.note.startswith("no curves")


def train_to_completion(assembly, workdir) -> None:
    """Train to the last step; the result is that of the run without interruption."""
    run.train(assembly._replace(workdir=epath.Path(workdir)), lambda record: None)
    assert saved(workdir, STEPS) == saved(assembly.workdir, STEPS)
    expected, resumed = (without_times(records_of(w)) for w in (assembly.workdir, workdir))
    assert resumed == expected


def signal_now(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # the thread that hears it


@pytest.mark.parametrize("last", [1, 4, 7])
def test_preempted_during_a_step(whole, tmp_path, last, capsys):
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path))

    def show(record: dict) -> None:
        if record["step"] == last and "loss" in record:
            signal_now()

    with pytest.raises(StoppedError, match=r"stopped after step (\d+), which is saved") as error:
        run.train(assembly, show)
    assert "SIGTERM: saving after this step" in capsys.readouterr().err
    done = int(str(error.value).split()[3].strip(","))
    assert last <= done <= last + IN_FLIGHT and latest_step(tmp_path) == done
    train_to_completion(whole[0], tmp_path)


def test_preempted_during_a_save(whole, tmp_path, monkeypatch):
    write, told = checkpoint_format.write_file, []

    def once(*args):
        if not told:
            told.append(signal_now())
        return write(*args)

    monkeypatch.setattr(checkpoint_format, "write_file", once)
    with pytest.raises(StoppedError):
        run.train(whole[0]._replace(workdir=epath.Path(tmp_path)), lambda record: None)
    assert told and 4 <= latest_step(tmp_path) <= 8
    train_to_completion(whole[0], tmp_path)


def test_preempted_during_an_evaluation(whole, tmp_path, monkeypatch):
    """Leave the evaluation; the resumed run does it again."""
    assembly, batches = whole[0]._replace(workdir=epath.Path(tmp_path)), whole[0].dataset.test

    def test():
        signal_now()
        yield from batches()

    dataset = dataclasses.replace(assembly.dataset, test=test)
    with pytest.raises(StoppedError, match="after step 4, which is saved"):
        run.train(assembly._replace(dataset=dataset), lambda record: None)
    assert not any("test_loss" in r for r in records_of(tmp_path))

    def show(record: dict) -> None:
        if record["step"] == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        run.train(assembly, show)
    assert any("test_loss" in r for r in records_of(tmp_path)), "of step 4, which is done again"
    train_to_completion(whole[0], tmp_path)


def test_signals_are_as_before_a_run(whole):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with handle_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_a_stop_in_an_evaluation_left_out_counts_for_the_best(whole, tmp_path, monkeypatch):
    """Step 4 is saved without its loss, the lowest: it is evaluated again, and kept."""
    config = gpipe.load(CONFIG, ["train.keep=1", "train.keep_best=1"])
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path), config=config)
    losses = {4: 1.0, 8: 2.0, STEPS: 3.0}

    def stopped(*_):
        raise StoppedError("stopped during an evaluation")

    monkeypatch.setattr(run.loop, "evaluate", stopped)
    with pytest.raises(StoppedError, match="after step 4, which is saved"):
        run.train(assembly, lambda record: None)
    monkeypatch.setattr(
        run.loop, "evaluate", lambda _, state, stop: {"test_loss": losses[state.step]}
    )
    run.train(assembly, lambda record: None)
    assert checkpoint_manifest.steps(assembly.checkpoints) == [STEPS, 4]


def test_other_steps_between_saves(whole, tmp_path):
    config = gpipe.load(CONFIG, ["train.save_every=3", "train.keep=9"])
    run.train(whole[0]._replace(workdir=epath.Path(tmp_path), config=config), lambda record: None)
    folder = epath.Path(tmp_path) / "checkpoints"
    assert checkpoint_manifest.steps(folder) == [11, 9, 6, 3]
    evaluated = [m.step for m in checkpoint_manifest.manifests(folder) if m.metrics]
    assert evaluated == [11], "the others were not due for an evaluation"
    assert saved(tmp_path, STEPS) == saved(whole[0].workdir, STEPS)


def test_damaged_checkpoints_are_passed_over_and_set_aside(whole, tmp_path, capsys):
    shutil.copytree(whole[0].workdir, tmp_path / "run")
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path / "run"))
    part = tmp_path / "run" / "checkpoints" / "11" / "state" / "1.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    note = run.evaluate(assembly).note.splitlines()
    assert re.search(r"11 is damaged \(1.safetensors has .*\); using that of step 8", note[0])
    assert note[1] == "checkpoint: step 8"
    train_to_completion(whole[0], tmp_path / "run")
    assert "11 is damaged" in capsys.readouterr().err
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["11", "11.damaged", "8"]


def test_no_whole_checkpoint_is_no_new_start(whole, tmp_path):
    shutil.copytree(whole[0].workdir, tmp_path / "run")
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path / "run"))
    for step in (8, 11):
        (tmp_path / "run" / "checkpoints" / str(step) / "state" / "manifest.json").unlink()
    with pytest.raises(ConfigError) as error:
        run.train(assembly, lambda record: None)
    assert error.value.problems == (
        "all checkpoints here are damaged; to start again, use another folder (train.workdir=...)",
        "step 11: manifest.json is missing",
        "step 8: manifest.json is missing",
    )


def copied(whole, tmp_path) -> from_config.Assembly:
    """Return the whole run in another folder, which a test may change."""
    shutil.copytree(whole[0].workdir, tmp_path / "run")
    return whole[0]._replace(workdir=epath.Path(tmp_path / "run"))


@pytest.mark.parametrize("name", ["manifest.json", "1.safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_stays_and_an_older_one_is_taken(
    whole, tmp_path, monkeypatch, capsys, name
):
    assembly = copied(whole, tmp_path)
    read = type(assembly.workdir).read_bytes

    def fails(path):
        if path.match(f"checkpoints/11/state/{name}"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    def show(record: dict) -> None:
        if record["step"] == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(assembly.workdir), "read_bytes", fails)
        reason = f"11 cannot be used now ({name} cannot be read: Input/output error); using that"
        assert reason in run.evaluate(assembly).note
        with pytest.raises(KeyboardInterrupt):
            run.train(assembly, show)
        assert reason in capsys.readouterr().err
        assert (assembly.checkpoints / "11").exists(), "it is not set aside: it may be read again"
        run.train(assembly, lambda record: None)
    names = sorted(path.name for path in assembly.checkpoints.iterdir())
    assert names == ["11", "11.unreadable", "8"], "11 is saved again"
    assert saved(tmp_path / "run", STEPS) == saved(whole[0].workdir, STEPS)


def test_none_can_be_read_now(whole, tmp_path, monkeypatch):
    assembly = copied(whole, tmp_path)

    def fails(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(type(assembly.workdir), "read_bytes", fails)
    message = r"no checkpoint in .* can be used, and some cannot be read now \(step 11: .*denied; s"
    with pytest.raises(errors.UnreadableCheckpointError, match=message):
        run.evaluate(assembly)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_checkpoints_are_not_there(whole, tmp_path):
    """Such as on a disk that is not mounted."""
    assembly = copied(whole, tmp_path)
    shutil.move(assembly.checkpoints, tmp_path / "elsewhere")
    before = (assembly.workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"has saved checkpoints, but .* has none now; mount or"):
        run.train(assembly, lambda record: None)
    assert (assembly.workdir / "metrics.jsonl").read_bytes() == before
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(errors.UnreadableCheckpointError, match="which is missing; mount that"):
        run.train(assembly, lambda record: None)
    shutil.move(tmp_path / "elsewhere", tmp_path / "disk")
    train_to_completion(whole[0], assembly.workdir)


def test_a_run_that_is_cut_off_before_its_first_checkpoint_starts_again(whole, tmp_path, capsys):
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path))

    def show(record: dict) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(assembly, show)
    train_to_completion(whole[0], tmp_path)
    assert (
        "so the run starts from step 0; the metrics of the earlier run" in capsys.readouterr().err
    )
    assert [r["step"] for r in metrics.read(assembly.workdir / "metrics.jsonl.kept")] == [1]


OTHER = {
    "fewer stages": ["mesh.stages=1"],
    "more replicas and micro-batches": ["mesh.data=2", "pipeline.micro_batches=4"],
    "chunks": ["mesh.stages=1", "pipeline.chunks=3", "pipeline.schedule=interleaved"],
    "another schedule and cut": ["pipeline.schedule=gpipe", "pipeline.partition=[2]"],
}


@pytest.mark.parametrize("overrides", OTHER.values(), ids=OTHER)
def test_a_run_goes_on_with_another_layout(whole, tmp_path, overrides):
    """Resume from step 8; the losses are those of the run that kept its layout."""
    shutil.copytree(whole[0].workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "11")
    shown: list[dict] = []
    run.train(assemble(tmp_path / "run", *overrides), shown.append)
    assert [r["step"] for r in shown] == [9, 10, 11, 11]
    wanted = [r for r in whole[2] if r["step"] > 8]
    for name in ("loss", "test_loss"):
        found, there = ([r[name] for r in some if name in r] for some in (shown, wanted))
        assert found == pytest.approx(there, rel=1e-5) and found


GRID = {
    "K 1": ["mesh.stages=1"],
    "K 2, D 2": ["mesh.stages=2", "mesh.data=2"],
    "K 3, gpipe": ["mesh.stages=3", "pipeline.schedule=gpipe"],
    "K 5, M 8, eager": [
        "mesh.stages=5", "pipeline.micro_batches=8", "pipeline.schedule=eager_1f1b",
    ],
    "K 2, V 2": ["mesh.stages=2", "pipeline.schedule=interleaved", "pipeline.chunks=2"],
    "K 1, V 3, D 4": [
        "mesh.stages=1", "mesh.data=4", "pipeline.schedule=interleaved", "pipeline.chunks=3",
    ],
    "layer by layer": ["pipeline.remat=layer"],
}  # fmt: skip


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """Train a convolution network of 4 stages for 40 steps, with a checkpoint of step 20."""
    config = {
        **CONFIG,
        "model": {"kind": "convnet", "widths": [4, 8], "depths": [2, 2]},
        "data": {"kind": "digits", "batch_size": 32, "shift": 1},
        "mesh": {"stages": 4},
        "pipeline": {"micro_batches": 4},
        "optimizer": {**CONFIG["optimizer"], "ema": 0.9},
        "train": {"steps": 40, "eval_every": 20},
    }
    workdir, shown = tmp_path_factory.mktemp("forty"), []
    run.train(from_config.assemble(gpipe.load(config), workdir), shown.append)
    return config, workdir, [r["loss"] for r in shown if r["step"] > 20 and "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", GRID.values(), ids=GRID)
def test_the_next_twenty_losses_with_another_layout(forty, tmp_path, overrides):
    config, workdir, wanted = forty
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    shown: list[dict] = []
    run.train(from_config.assemble(gpipe.load(config, overrides), tmp_path / "run"), shown.append)
    found = [r["loss"] for r in shown if "loss" in r]
    assert len(found) == 20 and found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "stats", "names"),
    [
        ("mesh.data=2", {"mean": 0}, "changes batch norm: "),
        (
            "model.dropout=0.1",
            {"mean": 0},
            "batch norm and dropout (pipeline.keys_per: micro_batch)",
        ),
        ("model.dropout=0.1", {}, "changes dropout (pipeline.keys_per: micro_batch): "),
    ],
)
def test_another_cut_of_the_batch_that_changes_results_is_said(override, stats, names):
    config = gpipe.load("configs/text.yaml", ["mesh.stages=1", "mesh.simulate=null"])
    before = config.model_dump(mode="json")
    now = gpipe.load(config, [override, "pipeline.micro_batches=1"])
    pipe = SimpleNamespace(shapes=[SimpleNamespace(stats=stats)])
    assembly = SimpleNamespace(config=now, trainer=SimpleNamespace(pipe=pipe))
    assert names in run._other_split(assembly, before)
    assert run._other_split(assembly, now.model_dump(mode="json")) is None, "it is the same"
    per_example = gpipe.load(now, ["pipeline.keys_per=example"])
    found = run._other_split(SimpleNamespace(config=per_example, trainer=assembly.trainer), before)
    assert ("dropout" in found) is False if stats else found is None


# --- folders that cannot be used -----------------------------------------------------------------


def other_config(whole, *overrides: str) -> from_config.Assembly:
    assembly = whole[0]
    return assembly._replace(config=gpipe.load(CONFIG, overrides))


def test_a_folder_of_another_config_lists_what_differs(whole):
    before = (whole[0].workdir / "config.yaml").read_bytes()
    other = other_config(whole, "train.steps=5", "optimizer.learning_rate=0.5")
    with pytest.raises(ConfigError) as error:
        run.train(other, lambda record: None)
    rule, *lines = error.value.problems
    assert "another config; use another (train.workdir=...)" in rule
    assert lines == ["optimizer.learning_rate: 0.01 before, 0.5 now"]
    assert (whole[0].workdir / "config.yaml").read_bytes() == before


def test_another_way_to_write_the_same_folder_is_no_difference(whole):
    workdir = whole[0].workdir
    other = other_config(whole, f"train.workdir={workdir.parent}/./{workdir.name}/")
    run._same_run(other)(next(iter(checkpoint_manifest.manifests(whole[0].checkpoints))))


def test_a_setting_that_does_nothing_makes_no_other_run(whole):
    """Nor one that an earlier version wrote down."""
    manifest = next(iter(checkpoint_manifest.manifests(whole[0].checkpoints)))
    run._same_run(other_config(whole, "optimizer.decay_rate=0.5"))(manifest)
    old = {**manifest.config, "profile": {"start": 5, "steps": 0}}
    old["optimizer"] = {**old["optimizer"], "decay_steps": 7}
    run._same_run(whole[0])(dataclasses.replace(manifest, config=old))
    with pytest.raises(ConfigError, match=r"optimizer.decay_steps: 7 before, 1000 now"):
        falling = other_config(whole, "optimizer.schedule=exponential")
        run._same_run(falling)(dataclasses.replace(manifest, config=old))


@pytest.mark.parametrize("work", [lambda assembly: run.train(assembly, print), run.evaluate])
def test_other_data_under_the_same_config(whole, work):
    """Such as a text file that has grown."""
    data = {**whole[0].data_identity, "train_examples": 1438, "first_labels_crc32": 1}
    with pytest.raises(ConfigError, match="this run began with another data set; restore") as error:
        work(whole[0]._replace(data_identity=data))
    assert error.value.problems[1] == "train_examples: 1437 before, 1438 now"
    assert error.value.problems[2].startswith("first_labels_crc32: ")


@pytest.mark.parametrize(
    "override", ["train.seed=1", "data.test_fraction=0.3", "model.features=[64, 12, 10]"]
)
def test_evaluate_refuses_other_held_out_data_or_another_network(whole, override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        run.evaluate(other_config(whole, override))


def test_evaluate_without_a_checkpoint(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint to evaluate; train it first"):
        run.evaluate(whole[0]._replace(workdir=epath.Path(tmp_path) / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_folder_that_another_run_is_using(whole, tmp_path):
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path))
    with (
        run.exclusive(assembly.workdir),
        pytest.raises(
            errors.RunInUseError, match=r"another run is using .*; end it, or wait until"
        ),
    ):
        run.train(assembly, lambda record: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "run.json"]
    with run.exclusive(assembly.workdir):
        pass


def test_the_folder_is_ones_own_before_its_checkpoints_are_read(whole, monkeypatch):
    """Another run that is about to end may still write some."""

    def newest(*_):
        with pytest.raises(errors.RunInUseError), run.exclusive(whole[0].workdir):
            pass
        raise Interrupted

    monkeypatch.setattr(run.resume, "newest", newest)
    with pytest.raises(Interrupted):
        run.train(whole[0], lambda record: None)


def test_checkpoints_from_before_data_was_told(whole, monkeypatch):
    manifest = next(iter(checkpoint_manifest.manifests(whole[0].checkpoints)))
    assert isinstance(manifest, checkpoint_manifest.Manifest)
    old = dataclasses.replace(manifest, data={})
    monkeypatch.setattr(checkpoint_manifest, "read_manifest", lambda *_: old)
    assert run.evaluate(whole[0]).figures["steps"] == STEPS


def test_a_folder_that_is_a_file(whole, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot write here .*train.workdir"):
            run.train(whole[0]._replace(workdir=epath.Path(workdir)), lambda record: None)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(whole, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "config.yaml")

    monkeypatch.setattr(run.atomic_files, "write_text", refuse)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"cannot write here .*Permission denied"):
        run.train(whole[0]._replace(workdir=epath.Path(tmp_path)), lambda record: None)


def test_a_checkpoint_that_does_not_fit(whole, monkeypatch):
    assembly, shapes = whole[0], whole[0].trainer.layer_shapes()
    more = shapes._replace(layers={**shapes.layers, 3: shapes.layers[2]})
    monkeypatch.setattr(assembly.trainer, "layer_shapes", lambda: more)
    monkeypatch.setattr(assembly.trainer.pipe, "layers", (*assembly.trainer.pipe.layers, "another"))
    for action in (run.evaluate, lambda p: run.train(p, lambda record: None)):
        with pytest.raises(ConfigError, match="does not fit this run: missing layer 3"):
            action(assembly)


# --- the cut by measured times -------------------------------------------------------------------


def test_a_measured_cut_is_that_of_the_first_start(tmp_path, monkeypatch, capsys):
    """Measure once: other times at the next start would cut elsewhere."""
    timed = ["pipeline.cost=time", "train.steps=2"]

    def assemble_with(times: list[float], *overrides: str) -> from_config.Assembly:
        numbers = iter(times)
        monkeypatch.setattr(costs, "_measured_time", lambda *_: next(numbers))
        return assemble(tmp_path, *timed, *overrides)

    first = assemble_with([1.0, 1.0, 9.0])
    assert first.trainer.pipe.partition.boundaries == (2,)
    run.train(first, lambda record: None)
    later = assemble_with([9.0, 1.0, 1.0])
    assert later.trainer.pipe.partition.boundaries == (2,)
    said = "the stages begin at layers [2], as at the first start of this run"
    assert said in capsys.readouterr().err
    other = assemble_with([9.0, 1.0, 1.0], "pipeline.remat=layer")
    assert other.trainer.pipe.partition.boundaries == (1,)
    given = assemble_with([9.0, 1.0, 1.0], "pipeline.partition=[1]")
    assert given.trainer.pipe.partition.boundaries == (1,)
    assert said not in capsys.readouterr().err


# --- another length ------------------------------------------------------------------------------


def test_a_finished_run_can_be_extended(tmp_path, capsys):
    """End as a run that had this length from the start."""
    long = assemble(tmp_path / "long", "optimizer.schedule=constant", "train.steps=6")
    run.train(long, lambda record: None)
    config = gpipe.load(long.config, ["train.steps=4"])
    short = long._replace(workdir=epath.Path(tmp_path / "short"), config=config)
    for assembly in (short, short._replace(config=long.config)):
        run.train(assembly, lambda record: None)
    assert saved(tmp_path / "short", 6) == saved(tmp_path / "long", 6)
    said = "train.steps is now 6, before 4: the run resumes to step 6\n"
    assert said in capsys.readouterr().err
    assert gpipe.load(str(tmp_path / "short" / "config.yaml")).train.steps == 6


def test_what_follows_the_length_is_said(whole):
    before = whole[0].config.model_dump(mode="json")
    now = gpipe.load(CONFIG, ["train.steps=50"])
    said = run._other_steps(now, before)
    assert said is not None and said.endswith(
        "to step 50, but not as if it had begun with 50: the learning rate (optimizer.schedule: "
        "cosine) now depends on 50 steps; for that result, start again in another folder "
        "(train.workdir=...)"
    )
    model = {"kind": "python", "function": "mine.py:layers"}
    own = gpipe.load({**CONFIG, "model": model}, ["train.steps=50", "optimizer.schedule=constant"])
    said = run._other_steps(own, before)
    assert said is not None and said.endswith(
        "50; layers of yours that read `progress` follow the new length"
    )


def test_a_run_has_done_more_steps_already(whole):
    with pytest.raises(ConfigError, match=f"train.steps is 5, but the run here has done {STEPS}"):
        run.train(other_config(whole, "train.steps=5"), lambda record: None)


# --- errors in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DataError("label 12 is none of 10"), OSError("no such disk")])
def test_the_steps_before_a_bad_batch_are_saved(whole, tmp_path, capsys, error):
    def train(step: int, rows=None):
        yield from itertools.islice(good.train(step, rows), 6 - step)
        raise error

    good = whole[0].dataset
    bad = whole[0]._replace(
        workdir=epath.Path(tmp_path), dataset=dataclasses.replace(good, train=train)
    )
    with pytest.raises(type(error), match=str(error)):
        run.train(bad, lambda record: None)
    assert latest_step(tmp_path) == 6
    assert "step 6 is saved before the run ends; the same command" in capsys.readouterr().err
    train_to_completion(whole[0], tmp_path)


def test_nothing_is_saved_before_the_first_step(whole, tmp_path, capsys):
    dataset = dataclasses.replace(whole[0].dataset, train=lambda *_: iter([{}]))
    with pytest.raises(DataError):
        run.train(
            whole[0]._replace(workdir=epath.Path(tmp_path), dataset=dataset), lambda record: None
        )
    assert latest_step(tmp_path) is None and "saved" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "curves.png", "lock"])
def test_files_of_the_users_are_not_replaced(whole, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"and holds {name}, which the run would replace"):
        run.train(whole[0]._replace(workdir=epath.Path(tmp_path)), lambda record: None)
    assert (tmp_path / name).read_text() == "mine" and os.listdir(tmp_path) == [name]


# --- a finished run ------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_written_is_no_failure(whole, tmp_path):
    assembly = copied(whole, tmp_path)
    picture = tmp_path / "run" / "curves.png"
    picture.unlink()
    picture.mkdir()
    note = run.train(assembly, lambda record: None).note
    assert re.match(rf"no curves: cannot write {picture}: .* is a directory", note)
    picture.rmdir()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    picture.symlink_to(precious)
    assert run.train(assembly, lambda record: None).note == f"curves: {picture}"
    assert precious.read_text() == "mine" and not picture.is_symlink()


def test_records_that_cannot_be_drawn_are_no_failure(whole, tmp_path):
    assembly = copied(whole, tmp_path)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "speed": 2.0}\n')
    assert run.train(assembly, lambda record: None).note.startswith("no curves: cannot write ")


# --- divergence ----------------------------------------------------------------------------------


def steep(outputs, labels):
    """Return losses of infinite slope, times zero, for examples with the label 1."""
    steep = jnp.sqrt(jnp.where(labels[:, None] == 1, 0 * outputs**2, 1)).sum(-1)
    return gpipe.losses.softmax_cross_entropy(outputs, labels)[0] + steep


def test_what_an_update_left_that_is_not_finite_is_not_saved(whole, tmp_path, monkeypatch):
    """Check the state itself: the loss of a step is that of the parameters before it."""
    shutil.copytree(whole[0].workdir, tmp_path / "run")
    monkeypatch.setattr(from_config, "loss", lambda model: steep)
    assembly = assemble(tmp_path / "run", "train.steps=15", "train.save_every=1")
    with pytest.raises(DivergedError, match=r"layer 0, .* infinite in step 12, though"):
        run.train(assembly, lambda record: None)
    assert latest_step(tmp_path / "run") == STEPS


def ruined(whole, folder, step: int):
    """Copy a run, and save it again at `step` with NaN in its parameters."""
    shutil.copytree(whole[0].workdir, folder)
    config = gpipe.load(CONFIG, [f"train.steps={step}"])
    assembly = whole[0]._replace(workdir=epath.Path(folder), config=config)
    restored = run.resume.newest(assembly.checkpoints, assembly.trainer, lambda manifest: None)
    layers = assembly.trainer.to_layers(restored.state)
    jax.tree.leaves(layers.layers[1]["params"])[0][...] = np.nan
    info = checkpoint_manifest.RunInfo(step, assembly.config.model_dump(mode="json"), None)
    with contextlib.closing(Saver(assembly.checkpoints, keep=3)) as saver:
        saver.save(layers, info, [str(layer) for layer in assembly.trainer.pipe.layers])
    return assembly


def test_a_checkpoint_that_is_not_finite_counts_as_damaged(whole, tmp_path, capsys):
    """Resume from the one before it; export and evaluate that one too."""
    longer = ruined(whole, tmp_path / "run", STEPS + 1)
    note = run.evaluate(longer).note
    assert "12 is damaged (it holds NaN or infinity" in note and "checkpoint: step 11" in note
    figures = export(longer.workdir, tmp_path / "parameters.npz")
    assert (figures["step"], figures["damaged_steps"]) == (STEPS, [STEPS + 1])
    run.train(longer, lambda record: None)
    assert (longer.checkpoints / "12.damaged").exists()


def test_a_held_out_loss_that_is_not_finite_is_not_saved(whole, tmp_path, monkeypatch):
    """Check the last update too: it may ruin the parameters after a good training loss."""
    assembly = whole[0]._replace(workdir=epath.Path(tmp_path))
    monkeypatch.setattr(assembly.trainer, "evaluate", lambda *_: {"test_loss": float("nan")})
    with pytest.raises(DivergedError, match=r"held-out loss became nan at step 4 \(the last fin"):
        run.train(assembly, lambda record: None)
    assert latest_step(tmp_path) is None
    assert all("test_loss" not in r for r in records_of(tmp_path))
