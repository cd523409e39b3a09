"""A whole run from a config, and its working folder.

A run writes into its working folder: `config.yaml` (as resolved), `metrics.jsonl` (one object for
each logged step and each evaluation), `checkpoints/`, `curves.png`, `lock`; if asked for,
`tensorboard/` and `profile/`. The same folder continues it.
"""

import contextlib
import fcntl
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
from etils import epath

from gpipe_jax import plots
from gpipe_jax.checkpoint.format import Manifest
from gpipe_jax.config.loader import compare, dump
from gpipe_jax.config.run import Config
from gpipe_jax.distributed import processes
from gpipe_jax.distributed.preemption import Stop, listening
from gpipe_jax.errors import ConfigError, RunInUseError
from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.training import loop, metrics, resume, writers
from gpipe_jax.training.from_config import Assembly, assemble
from gpipe_jax.training.loop import TrainingLoop
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.console import say
from gpipe_jax.utils.text import GIB

__all__ = ["Assembly", "RunSummary", "assemble", "default_workdir", "evaluate", "train"]

# What may differ from the run that wrote a checkpoint: where and how the work is done, and what is
# written about it.
FREE = (
    *(f"mesh.{name}:" for name in ("stages", "data", "simulate")),
    *(
        f"pipeline.{name}:"
        for name in ("micro_batches", "schedule", "chunks", "partition", "cost", "memory_limit_gib")
    ),
    "pipeline.remat:",
    *(f"train.{name}:" for name in ("workdir", "log_every", "eval_every", "save_every")),
    *("train.keep:", "train.keep_best:", "train.writers:", "profile."),
)


class RunSummary(NamedTuple):
    """What a run came to."""

    figures: dict  # what `--json` prints
    note: str  # where the curves are, or why there are none


def train(parts: Assembly, show: Callable[[dict], None], stop: Stop | None = None) -> RunSummary:
    """Train to the end, from the newest whole checkpoint if there is one.

    `show` gets every record: of each step, and of each evaluation. On SIGTERM or Ctrl-C, unless
    somebody else listens to them for `stop`, it saves and raises StoppedError.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as held:
        held.enter_context(alone_in(parts.workdir))
        heard = held.enter_context(contextlib.nullcontext(stop) if stop else listening())
        restored = resume.newest(parts.checkpoints, parts.trainer, _same_run(parts))
        keep_config(parts)
        told = held.enter_context(_writers(parts, restored))
        run = TrainingLoop(parts, restored, show, heard, told)
        changed = _not_the_same(parts, restored.manifest.config) if restored else None
        if changed and processes.is_first():
            say(changed)
        with contextlib.closing(run.saver):
            run.to_the_end()
        heard.unsaved = False
    final = run.evaluated or {}
    times = {**_figures(parts, final, run.log.records, run.current.step), **_lost(parts.trainer)}
    times["wall_s"] = time.perf_counter() - started
    return RunSummary(times, _draw(parts, run.log.records))


def _writers(
    parts: Assembly, restored: resume.Restored | None
) -> contextlib.AbstractContextManager:
    names = parts.config.train.writers if processes.is_first() else ()
    step = restored.state.step if restored else 0
    return writers.opened(names, parts.workdir, parts.config.model_dump(mode="json"), step)


def evaluate(parts: Assembly, stop: Stop | None = None) -> RunSummary:
    """Evaluate the newest whole checkpoint of a run on its held-out data.

    Raises StoppedError if that is wished for meanwhile.
    """
    started = time.perf_counter()
    # On other data, or another split of it, the held-out examples may have been trained on.
    check = _same_run(parts, only=("model.", "data.", "train.seed:"))
    restored = resume.newest(parts.checkpoints, parts.trainer, check)
    if restored is None:
        problem = "there is no checkpoint to evaluate; train it first (gpipe train)"
        raise ConfigError([problem], str(parts.workdir))
    figures = loop.evaluate(parts, restored.state, stop)
    records = list(metrics.read(parts.workdir / "metrics.jsonl"))
    figures = _figures(parts, figures, records, restored.state.step)
    figures["wall_s"] = time.perf_counter() - started
    notes = [*resume.describe(restored), f"checkpoint: step {restored.state.step}"]
    return RunSummary(figures, "\n".join(notes))


@contextlib.contextmanager
def alone_in(workdir: epath.Path) -> Iterator[None]:
    """Make a folder, and have it to oneself. Raises InUseError, or ConfigError if it cannot be.

    Two runs in one folder would write the same files. The lock is the first process's, and ends
    with it; there is none on gs://, nor on file systems that have no locks.
    """
    with contextlib.ExitStack() as held:
        if processes.is_first():
            with _writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                local = atomic_files.is_local(workdir)
                file = held.enter_context((workdir / "lock").open("w")) if local else None
            _lock(file, workdir)
        processes.all_agree(True)  # the others wait for it
        yield


def _lock(file: IO | None, workdir: epath.Path) -> None:
    try:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        problem = f"another run is using {workdir}: end it, or wait until it has ended"
        raise RunInUseError(f"{problem}, or use another folder (train.workdir=...)") from error
    except OSError:
        pass  # a file system without locks


def keep_config(parts: Assembly) -> None:
    """Write the config into the working folder, with the folder's own name."""
    if processes.is_first():
        train = parts.config.train.model_copy(update={"workdir": str(parts.workdir)})
        with _writing(parts.workdir):
            text = dump(parts.config.model_copy(update={"train": train}))
            atomic_files.write_text(parts.workdir / "config.yaml", text, durable=True)


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot write here ({error}); use another folder (train.workdir=...)"
        raise ConfigError([problem], str(workdir)) from error


def _same_run(parts: Assembly, only: tuple[str, ...] = ("",)) -> Callable[[Manifest], None]:
    """A check that a checkpoint's run had this config, in settings that start with `only`."""

    def check(manifest: Manifest) -> None:
        try:
            there = Config.model_validate(manifest.config)
        except ValueError as error:
            problem = (
                f"the run here has a config that this version does not know; use the version that "
                f"wrote it ({manifest.versions['gpipe-jax']})"
            )
            raise ConfigError([problem], str(parts.workdir)) from error
        lines = compare(there, parts.config)
        different = [n for n in lines if n.startswith(only) and not n.startswith(FREE)]
        if different:
            rule = "this folder holds a run of another config; use another (train.workdir=...)"
            raise ConfigError([rule, *different], str(parts.workdir))
        changed = [
            f"{name}: {manifest.data.get(name)} there, {now} here"
            for name, now in parts.data.items()
            if manifest.data.get(name, now) != now
        ]
        if changed:
            rule = (
                "the data set is not the one that this run began with; bring that one back, or use "
                "another folder (train.workdir=...)"
            )
            raise ConfigError([rule, *changed], str(parts.workdir))

    return check


def _not_the_same(parts: Assembly, there: dict) -> str | None:
    """What another cut of the batch changes, if it is cut otherwise than in the config `there`."""
    now = parts.config
    parts_of_a_batch = now.mesh.data * now.pipeline.micro_batches
    before = there["mesh"]["data"] * there["pipeline"]["micro_batches"]
    depends = ["batch norm"] * any(jax.tree.leaves(s.stats) for s in parts.trainer.pipe.shapes)
    random = any(getattr(now.model, name, 0) for name in ("dropout", "drop_path"))
    if random and now.pipeline.keys_per == "micro_batch":
        depends.append("dropout (pipeline.keys_per: micro_batch)")
    if before == parts_of_a_batch or not depends:
        return None
    return (
        f"a batch is now cut into {parts_of_a_batch} parts (mesh.data x pipeline.micro_batches), "
        f"before into {before}, which changes {' and '.join(depends)}: the run goes on, but not as "
        "it would have gone"
    )


def _draw(parts: Assembly, records: list[dict]) -> str:
    picture = parts.workdir / "curves.png"
    if not processes.is_first():
        return "no curves: the first process draws them"
    if not records:
        return "no curves: metrics.jsonl is gone"
    if not atomic_files.is_local(picture):
        return "no curves: they are drawn into local folders only"
    try:
        plots.curves(records, Path(picture))
    except ImportError as error:
        return f"no curves: {error}"
    return f"curves: {picture}"


def _figures(parts: Assembly, final: dict, records: list[dict], steps: int) -> dict[str, Any]:
    pipe, times = parts.trainer.pipe, [r["step_time_s"] for r in records if "step_time_s" in r]
    step_time_s = statistics.median(times) if times else None
    return {
        **final,
        "steps": steps,
        "step_time_s": step_time_s,
        "examples_per_s": pipe.batch_size / step_time_s if step_time_s else None,
        "wall_s": None,
        "workdir": str(parts.workdir),
        "stages": pipe.stages.geometry.last + 1,
        "parameters": elements(pipe.shapes),
        "bubble_fraction": pipe.schedule.bubble_fraction,
        "device": f"{jax.devices()[0].platform} x {pipe.mesh.size}",
        "device_memory_gib": sum(parts.trainer.device_bytes().values()) / GIB,
    }


def _lost(trainer: Trainer) -> dict[str, Any]:
    """Time that was no training, in seconds, and the most memory that a device has used."""
    used = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    peak = [u / GIB for u in used if u is not None]
    return {
        **{f"{part}_s": seconds for part, seconds in trainer.timings.seconds.items()},
        "peak_memory_gib": max(peak, default=None),
    }


def default_workdir(source: Any) -> Path:
    """runs/<name of the config file>."""
    return Path("runs") / Path(str(source)).stem
