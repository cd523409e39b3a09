"""Carry out a whole run from a config, in its working folder.

A run writes into its folder: `config.yaml` (as resolved), `metrics.jsonl` (one object for each
logged step and each evaluation), `checkpoints/`, `curves.png`, `lock`, `run.json`; if the config
says so, `tensorboard/` and `profile/`. A later run in the same folder resumes it.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpipe_jax import plots
from gpipe_jax.checkpoint.manifest import Manifest
from gpipe_jax.config import loader
from gpipe_jax.config.base import Mark
from gpipe_jax.config.models import PythonModelConfig
from gpipe_jax.config.run import Config, calls, marks
from gpipe_jax.distributed import processes
from gpipe_jax.distributed.preemption import StopRequest, handle_signals
from gpipe_jax.errors import ConfigError
from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.run_folder.folder import CONFIG, CURVES, METRICS, exclusive, writing
from gpipe_jax.training import loop, metrics, resume, writers
from gpipe_jax.training.from_config import Assembly
from gpipe_jax.training.loop import TrainingLoop
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.messages import say
from gpipe_jax.utils.text import GIB

MAY_CHANGE = (Mark.LAYOUT, Mark.OPERATION)  # settings that may change when a run resumes


class RunSummary(NamedTuple):
    """Hold the results of a run."""

    figures: dict  # what `--json` prints
    note: str  # where the curves are, or why there are none


# --- train and evaluate ---------------------------------------------------------------------------


def train(
    assembly: Assembly, show: Callable[[dict], None], stop: StopRequest | None = None
) -> RunSummary:
    """Train to the end, from the newest intact checkpoint if there is one.

    Args:
        assembly: What to train, and where.
        show: A function that gets every record: of each step, and of each evaluation.
        stop: The request to stop that signals set. By default this function handles the signals
            of `distributed.preemption` itself: it saves and raises StoppedError.

    Raises:
        ConfigError: The folder holds another run or other files, has lost its checkpoints, or
            cannot be written.
        RunInUseError: Another run is using the folder.
        StoppedError, DivergedError, DataError, SaveError: See `TrainingLoop.run`.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(exclusive(assembly.workdir))
        listener = contextlib.nullcontext(stop) if stop else handle_signals(jax.process_count())
        stop = stack.enter_context(listener)
        restored = resume.newest(assembly.checkpoints, assembly.trainer, _same_run(assembly))
        if restored:
            folder.note_saved()
        else:
            folder.begin()
        write_config(assembly)
        opened = stack.enter_context(_writers(assembly, restored))
        run = TrainingLoop(assembly, folder, restored, show, stop, opened)
        if restored and processes.is_first():
            before = Config.model_validate(restored.manifest.config).model_dump(mode="json")
            for warning in _warnings(assembly, before):
                say(warning)
        with contextlib.closing(run.saver):
            run.run()
        stop.has_unsaved = False
    final = run.evaluation or {}
    figures = _figures(assembly, final, run.log.records, run.current.step)
    figures |= _overheads(assembly.trainer)
    figures["wall_s"] = time.perf_counter() - started
    notes = [_ended_by_callback(run), _draw(assembly, run.log.records)]
    return RunSummary(figures, "\n".join(note for note in notes if note))


def _ended_by_callback(run: TrainingLoop) -> str | None:
    """Say that a callback ended the run before its last step, and how to go on; else None."""
    steps = run.assembly.config.train.steps
    if not run.ended or run.current.step == steps:
        return None
    return (
        f"a callback (train.callbacks) ended the run at step {run.current.step} of {steps}; to go "
        f"on, run the same command with train.callbacks=[], or with other arguments, such as more "
        f"patience"
    )


def _writers(
    assembly: Assembly, restored: resume.Restored | None
) -> contextlib.AbstractContextManager:
    names = assembly.config.train.writers if processes.is_first() else ()
    step = restored.state.step if restored else 0
    return writers.opened(names, assembly.workdir, assembly.config.model_dump(mode="json"), step)


def evaluate(assembly: Assembly, stop: StopRequest | None = None) -> RunSummary:
    """Evaluate the newest intact checkpoint of a run on its held-out data.

    Args:
        assembly: The run.
        stop: The request to stop that signals set, if the evaluation may be stopped.

    Raises:
        ConfigError: There is no checkpoint, or it is of another network or other data.
        StoppedError: `stop` was reached.
    """
    started = time.perf_counter()
    # On other data, or another split of it, the held-out examples may have been trained on.
    check = _same_run(assembly, sections=("model", "data"), settings=("train.seed",))
    restored = resume.newest(assembly.checkpoints, assembly.trainer, check)
    if restored is None:
        problem = "there is no checkpoint to evaluate; train it first (gpipe train)"
        raise ConfigError([problem], str(assembly.workdir))
    final = loop.evaluate(assembly, restored.state, stop)
    records = _records(assembly)
    figures = _figures(assembly, final, records, restored.state.step)
    figures["wall_s"] = time.perf_counter() - started
    notes = [*resume.describe(restored), f"checkpoint: step {restored.state.step}"]
    return RunSummary(figures, "\n".join(notes))


# --- the folder -----------------------------------------------------------------------------------


def write_config(assembly: Assembly) -> None:
    """Write the config into the working folder, with the folder's own name."""
    if processes.is_first():
        folders = {"workdir": str(assembly.workdir)}
        if calls(assembly.config):  # `gpipe eval FOLDER` runs the same code
            folders["code"] = os.path.abspath(assembly.config.train.code or "")
        train = assembly.config.train.model_copy(update=folders)
        with writing(assembly.workdir):
            text = loader.dump(assembly.config.model_copy(update={"train": train}))
            atomic_files.write_text(assembly.workdir / CONFIG, text, durable=True)


def default_workdir(source: Any) -> Path:
    """Return the folder of a run whose config does not say one: runs/<name of the file>."""
    return Path("runs") / Path(str(source)).stem


# --- resume ---------------------------------------------------------------------------------------


def _same_run(
    assembly: Assembly, sections: tuple[str, ...] | None = None, settings: tuple[str, ...] = ()
) -> Callable[[Manifest], None]:
    """Return a check that a checkpoint's run had this config and data.

    Settings that change no result may differ. If `sections` are given, then only these and the
    single `settings` are compared.
    """
    free = {name for name, mark in marks().items() if mark in MAY_CHANGE}
    free.add("train.steps")  # a run can be extended

    def matters(name: str) -> bool:
        if sections is None:
            return name not in free
        return name.partition(".")[0] in sections or name in settings

    def check(manifest: Manifest) -> None:
        if not manifest.config:
            problem = (
                "the checkpoint here is of trainer.save, which knows no config; to start with its "
                "parameters, use another folder (train.workdir=...) and train.init_from"
            )
            raise ConfigError([problem], str(assembly.workdir))
        try:
            before = Config.model_validate(manifest.config)
        except ValueError as error:
            problem = (
                f"the run here has a config that this version cannot read; use the version that "
                f"wrote it ({manifest.versions.get('gpipe-jax', 'it names none')})"
            )
            raise ConfigError([problem], str(assembly.workdir)) from error
        differences = loader.compare(before, assembly.config)
        different = {name: pair for name, pair in differences.items() if matters(name)}
        if different:
            rule = "this folder holds a run of another config; use another (train.workdir=...)"
            lines = loader.describe_differences(different)
            raise ConfigError([rule, *lines], str(assembly.workdir))
        if sections is None:
            _check_steps(manifest, assembly)
        _same_data(manifest, assembly)

    return check


def _check_steps(manifest: Manifest, assembly: Assembly) -> None:
    """Raise ConfigError if the run has already done more steps than the config asks for."""
    steps = assembly.config.train.steps
    if steps < manifest.step:
        problem = (
            f"train.steps is {steps}, but the run here has done {manifest.step} steps; "
            f"use {manifest.step} or more, or another folder (train.workdir=...)"
        )
        raise ConfigError([problem], str(assembly.workdir))


def _same_data(manifest: Manifest, assembly: Assembly) -> None:
    # Older versions noted less of the data set.
    changed = {
        name: (manifest.data[name], now)
        for name, now in assembly.data_identity.items()
        if manifest.data.get(name, now) != now
    }
    if changed:
        rule = (
            "this run began with another data set; restore that data set, or use "
            "another folder (train.workdir=...)"
        )
        raise ConfigError([rule, *loader.describe_differences(changed)], str(assembly.workdir))


def _warnings(assembly: Assembly, before: dict) -> list[str]:
    """Return what a user should know of a run that resumes with other settings than `before`."""
    found = (_other_split(assembly, before), _other_steps(assembly.config, before))
    return [warning for warning in found if warning]


def _other_steps(config: Config, before: dict) -> str | None:
    """Return a note if the run has another length than before; some settings follow it."""
    steps, steps_before = config.train.steps, before["train"]["steps"]
    if steps == steps_before:
        return None
    followers = []
    if config.optimizer.schedule == "cosine":
        followers.append("the learning rate (optimizer.schedule: cosine)")
    if getattr(config.model, "drop_path", 0):
        followers.append("drop-path (model.drop_path)")
    note = f"train.steps is now {steps}, before {steps_before}: the run resumes to step {steps}"
    if config.train.callbacks:
        note += ", if no callback ends it before"
    if followers:
        note += (
            f", but not as if it had begun with {steps}: {' and '.join(followers)} now depends on "
            f"{steps} steps; for that result, start again in another folder (train.workdir=...)"
        )
    if isinstance(config.model, PythonModelConfig):
        note += "; layers of yours that read `progress` follow the new length"
    return note


def _other_split(assembly: Assembly, before: dict) -> str | None:
    """Return a warning if a batch is split into other micro-batches than before, and it matters."""
    config = assembly.config
    now_split = config.mesh.data * config.pipeline.micro_batches
    before_split = before["mesh"]["data"] * before["pipeline"]["micro_batches"]
    affected = []
    if any(jax.tree.leaves(shape.stats) for shape in assembly.trainer.pipe.shapes):
        affected.append("batch norm")
    if config.model.has_dropout and config.pipeline.keys_per == "micro_batch":
        affected.append("dropout (pipeline.keys_per: micro_batch)")
    if before_split == now_split or not affected:
        return None
    return (
        f"a batch is now split into {now_split} micro-batches (mesh.data x pipeline.micro_batches),"
        f" before into {before_split}, which changes {' and '.join(affected)}: the run resumes, "
        f"but not as it would have continued"
    )


# --- results --------------------------------------------------------------------------------------


def _records(assembly: Assembly) -> list[dict]:
    """Return the records of a run's metrics file; an evaluation also works without them."""
    path = assembly.workdir / METRICS
    try:
        return list(metrics.read(path))
    except Exception as error:  # of the disk, or of a bucket's client
        say(f"{path} cannot be read: {error}")
        return []


def _draw(assembly: Assembly, records: list[dict]) -> str:
    picture = assembly.workdir / CURVES
    if not processes.is_first():
        return "no curves: the first process draws them"
    if not records:
        return "no curves: metrics.jsonl has been removed"
    if not atomic_files.is_local(picture):
        return "no curves: they are drawn into local folders only"
    try:
        # Drawn elsewhere, because matplotlib would follow a link.
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder) / CURVES
            plots.curves(records, drawn)
            with atomic_files.replacing(picture) as draft:
                draft.write_bytes(drawn.read_bytes())
    except ImportError as error:
        return f"no curves: {error}"
    except Exception as error:  # the run is complete; a picture must not make it fail
        return f"no curves: cannot write {picture}: {error}"
    return f"curves: {picture}"


def _figures(assembly: Assembly, final: dict, records: list[dict], steps: int) -> dict[str, Any]:
    pipe = assembly.trainer.pipe
    times = [record["step_time_s"] for record in records if "step_time_s" in record]
    step_time_s = statistics.median(times) if times else None
    return {
        **final,
        "steps": steps,
        "step_time_s": step_time_s,
        "examples_per_s": pipe.batch_size / step_time_s if step_time_s else None,
        "wall_s": None,
        "workdir": str(assembly.workdir),
        "stages": pipe.stages.geometry.num_stages,
        "parameters": elements(pipe.shapes),
        "bubble_fraction": pipe.schedule.bubble_fraction,
        "device": f"{jax.devices()[0].platform} x {pipe.mesh.size}",
        "device_memory_gib": sum(assembly.trainer.device_bytes().values()) / GIB,
    }


def _overheads(trainer: Trainer) -> dict[str, Any]:
    """Return the seconds that were not training, and the most memory that a device has used."""
    used = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    peak = [u / GIB for u in used if u is not None]
    return {
        **{f"{activity}_s": seconds for activity, seconds in trainer.timings.seconds.items()},
        "peak_memory_gib": max(peak, default=None),
    }
