"""A whole run from a config: the only place that sees all of it.

A run writes into its working folder: `config.yaml` (as resolved), `metrics.jsonl` (one object for
each logged step and each evaluation), `checkpoints/`, `curves.png`; if asked for, `tensorboard/`
and `profile/`. The same folder continues it.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from gpipe_jax import build, checkpoint, data, hosts, metrics, optimizer, plots, restoring, writers
from gpipe_jax.build import section
from gpipe_jax.config import Config, TextConfig
from gpipe_jax.interrupt import Stop, StoppedError, listening
from gpipe_jax.loader import ConfigError, compare, dump
from gpipe_jax.mesh import make_mesh, simulate_devices
from gpipe_jax.pipeline import Pipeline
from gpipe_jax.profile import Profile
from gpipe_jax.trainer import Trainer, TrainState

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


class Parts(NamedTuple):
    """What a config describes."""

    config: Config
    workdir: epath.Path
    dataset: data.Dataset
    trainer: Trainer


class Summary(NamedTuple):
    """What a run came to."""

    figures: dict  # what `--json` prints
    note: str  # where the curves are, or why there are none


def assemble(config: Config, workdir: epath.PathLike, processes: int = 1) -> Parts:
    """Data, network, mesh, pipeline and optimizer of a config; trains nothing.

    Simulated devices are shared among so many processes. Raises `build.SectionError`: until the
    first step, what is wrong is the config.
    """
    if config.mesh.simulate:
        with section("mesh"):
            simulate_devices(_share(config.mesh.simulate, processes))
    with section("train"):
        writers.check(config.train.writers)
    with section("data"):
        dataset = build.dataset(config)
        example = next(dataset.train(0))
    with section("model"):
        layers, loss = build.network(config.model), build.loss(config.model)
    with section("mesh"):
        mesh = make_mesh(stages=config.mesh.stages, data=config.mesh.data)
    with section("pipeline"):
        options = config.pipeline.model_dump(exclude={"memory_limit_gib"})
        limit = config.pipeline.memory_limit_gib
        options["memory_limit"] = None if limit is None else limit * 2**30
        steps = config.train.steps
        pipe = Pipeline(layers, loss=loss, mesh=mesh, example=example, steps=steps, **options)
    with section("optimizer"):
        tx = optimizer.build(config.optimizer, config.train.steps)
        trainer = Trainer(pipe, tx, ema=config.optimizer.ema)
        return Parts(config, epath.Path(workdir), dataset, trainer)


def _share(simulated: int, processes: int) -> int:
    if simulated % processes:
        raise ValueError(
            f"`simulate` {simulated} devices do not split over {processes} processes; use a "
            f"multiple of {processes}"
        )
    return simulated // processes


def train(parts: Parts, show: Callable[[dict], None]) -> Summary:
    """Train to the end, from the newest whole checkpoint if there is one.

    `show` gets every record: of each step, and of each evaluation. On SIGTERM or Ctrl-C it saves
    and raises StoppedError.
    """
    started = time.perf_counter()
    restored = restoring.newest(_checkpoints(parts), parts.trainer, _same_run(parts))
    claim(parts)
    with listening() as stop, _writers(parts, restored) as told:
        run = _Run(parts, restored, show, stop, told)
        with contextlib.closing(run.saver):
            run.to_the_end()
    final = run.evaluated or {}
    times = {**_figures(parts, final, run.log.records, run.current.step), **_lost(parts.trainer)}
    times["wall_s"] = time.perf_counter() - started
    return Summary(times, _draw(parts, run.log.records))


def _writers(
    parts: Parts, restored: restoring.Restored | None
) -> contextlib.AbstractContextManager:
    names = parts.config.train.writers if hosts.is_first() else ()
    step = restored.state.step if restored else 0
    return writers.opened(names, parts.workdir, parts.config.model_dump(mode="json"), step)


class _Run:
    """The loop of a training run, and where it stands."""

    def __init__(
        self,
        parts: Parts,
        restored: restoring.Restored | None,
        show: Callable[[dict], None],
        stop: Stop,
        told: Sequence[writers.Writer],
    ) -> None:
        from gpipe_jax.saving import Saver  # Orbax takes two seconds

        self.parts, self.stop, config = parts, stop, parts.config.train
        self.current = restored.state if restored else parts.trainer.init(config.seed)
        self.saved: int | None = restored.manifest.step if restored else None
        self.evaluated = restored.manifest.metrics if restored else None
        if restored and hosts.is_first():
            for line in restoring.describe(restored):
                print(f"gpipe: {line}", file=sys.stderr)
            restoring.set_aside(restored)
        path = parts.workdir / "metrics.jsonl" if hosts.is_first() else None
        done = self.evaluated is not None
        self.log = metrics.Log(path, config.log_every, self.current.step, done, show, told)
        traces = parts.workdir / "profile" if hosts.is_first() else None
        self.profile = Profile(parts.config.profile.start, parts.config.profile.steps, traces)
        self.saver = Saver(_checkpoints(parts), keep=config.keep, keep_best=config.keep_best)

    def to_the_end(self) -> None:
        """Train, evaluate and save, each when it is due. Raises StoppedError once it is saved."""
        trainer, config = self.parts.trainer, self.parts.config.train
        rows = trainer.pipe.rows
        some = rows if len(rows) < trainer.pipe.batch_size else None
        batches = self.parts.dataset.train(self.current.step, some)
        self.stop.unsaved = False
        begun = self.current.step

        def stopped(step: int) -> bool:
            self.stop.unsaved = step > begun
            return self.stop.reached(step)

        while True:
            step, stopping = self.current.step, self._evaluate_if_due()
            if stopping or step == self._next(step - 1, config.save_every or config.eval_every):
                self._save()
            if step == config.steps:
                return self._finish()
            if stopping:
                raise self._stopped()
            due = self._next(step, config.eval_every)
            due = min(due, self._next(step, config.save_every or config.eval_every))
            due = min(due, self.profile.until(step) or due)
            with self.profile.over(step):
                self.current = trainer.fit(self.current, batches, due, self.log.step, stopped)
            if self.current.step > step:
                self.evaluated = None
            if self.current.step < due:
                self._save()
                raise self._stopped()

    def _next(self, step: int, every: int) -> int:
        """The next step after `step` that something is due at."""
        return min((step // every + 1) * every, self.parts.config.train.steps)

    def _evaluate_if_due(self) -> bool:
        """Whether the run is to stop, which an evaluation doesn't wait for its end for."""
        step, trainer = self.current.step, self.parts.trainer
        if step == 0 or step != self._next(step - 1, self.parts.config.train.eval_every):
            return False
        if self.evaluated is not None:
            return False
        try:
            figures = _evaluate(self.parts, self.current, self.stop)
        except StoppedError:
            return True
        trainer.check_finite("held-out loss", step, figures["test_loss"])
        self.log.evaluation({"step": step, **figures})
        self.evaluated = figures
        return False

    def _save(self) -> None:
        """Begin to save, unless this step is saved, or there is nothing to save."""
        step, trainer = self.current.step, self.parts.trainer
        if step in (0, self.saved):
            return
        with trainer.ledger.spend("checkpoint"):
            self.log.sync()
            self.saver.save(
                trainer.to_layers(self.current),
                step,
                descriptions=[str(layer) for layer in trainer.pipe.layers],
                config=self.parts.config.model_dump(mode="json"),
                metrics=self.evaluated,
            )
        self.saved = step

    def _finish(self) -> None:
        with self.parts.trainer.ledger.spend("checkpoint"):
            self.saver.wait()

    def _stopped(self) -> StoppedError:
        self._finish()
        return StoppedError(f"stopped after step {self.current.step}, which is saved")


def evaluate(parts: Parts) -> Summary:
    """Evaluate the newest whole checkpoint of a run on its held-out data."""
    started = time.perf_counter()
    # On other data, or another split of it, the held-out examples may have been trained on.
    check = _same_run(parts, only=("model.", "data.", "train.seed:"))
    restored = restoring.newest(_checkpoints(parts), parts.trainer, check)
    if restored is None:
        problem = "there is no checkpoint to evaluate; train it first (gpipe train)"
        raise ConfigError([problem], str(parts.workdir))
    figures = _evaluate(parts, restored.state)
    records = list(metrics.read(parts.workdir / "metrics.jsonl"))
    figures = _figures(parts, figures, records, restored.state.step)
    figures["wall_s"] = time.perf_counter() - started
    notes = [*restoring.describe(restored), f"checkpoint: step {restored.state.step}"]
    return Summary(figures, "\n".join(notes))


def claim(parts: Parts) -> None:
    """Make the working folder this run's own."""
    if not hosts.is_first():
        return
    # With the folder's own name, so that its config.yaml is the config of this very run.
    train = parts.config.train.model_copy(update={"workdir": str(parts.workdir)})
    try:
        parts.workdir.mkdir(parents=True, exist_ok=True)
        text = dump(parts.config.model_copy(update={"train": train}))
        metrics.replace(parts.workdir / "config.yaml", text)
    except OSError as error:
        problem = f"cannot write here ({error}); use another folder (train.workdir=...)"
        raise ConfigError([problem], str(parts.workdir)) from error


def _same_run(parts: Parts, only: tuple[str, ...] = ("",)) -> Callable[[checkpoint.Manifest], None]:
    """A check that a checkpoint's run had this config, in settings that start with `only`."""

    def check(manifest: checkpoint.Manifest) -> None:
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

    return check


def _checkpoints(parts: Parts) -> epath.Path:
    return parts.workdir / "checkpoints"


def _evaluate(parts: Parts, current: TrainState, stop: Stop | None = None) -> dict[str, float]:
    trainer = parts.trainer

    def batches() -> Iterator[dict]:
        for batch in parts.dataset.test():
            if stop is not None and stop.now:
                raise StoppedError("stopped during an evaluation")
            yield batch

    with trainer.ledger.spend("evaluation"):
        figures = trainer.evaluate(trainer.evaluated(current), batches())
    if isinstance(parts.config.data, TextConfig):
        figures["bits_per_byte"] = figures["test_loss"] / float(np.log(2))
    return figures


def _draw(parts: Parts, records: list[dict]) -> str:
    picture = parts.workdir / "curves.png"
    if not records:
        return "no curves: metrics.jsonl is gone"
    if not metrics.is_local(picture):
        return "no curves: they are drawn into local folders only"
    try:
        plots.curves(records, Path(picture))
    except ImportError as error:
        return f"no curves: {error}"
    return f"curves: {picture}"


def _figures(parts: Parts, final: dict, records: list[dict], steps: int) -> dict[str, Any]:
    pipe, times = parts.trainer.pipe, [r["step_time_s"] for r in records if "step_time_s" in r]
    step_time_s = statistics.median(times) if times else None
    return {
        **final,
        "steps": steps,
        "step_time_s": step_time_s,
        "examples_per_s": pipe.batch_size / step_time_s if step_time_s else None,
        "wall_s": None,
        "workdir": str(parts.workdir),
        "stages": pipe.stages.last + 1,
        "parameters": sum(a.size for s in pipe.shapes for a in jax.tree.leaves(s.params)),
        "bubble_fraction": pipe.schedule.bubble_fraction,
        "device": f"{jax.devices()[0].platform} x {pipe.mesh.size}",
        "device_memory_gib": sum(parts.trainer.device_bytes().values()) / 2**30,
    }


def _lost(trainer: Trainer) -> dict[str, Any]:
    """Time that was no training, in seconds, and the most memory that a device has used."""
    used = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    peak = [u / 2**30 for u in used if u is not None]
    return {
        **{f"{part}_s": seconds for part, seconds in trainer.ledger.seconds.items()},
        "peak_memory_gib": max(peak, default=None),
    }


def default_workdir(source: Any) -> Path:
    """runs/<name of the config file>."""
    return Path("runs") / Path(str(source)).stem
