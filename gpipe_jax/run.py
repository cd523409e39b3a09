"""A whole run from a config: the only place that sees all of it.

A run writes into its working folder: `config.yaml` (as resolved), `metrics.jsonl` (one object for
each logged step and each evaluation), `checkpoints/`, `curves.png`. The same folder continues it.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax import build, checkpoint, data, optimizer, plots
from gpipe_jax.build import section
from gpipe_jax.config import Config, TextConfig
from gpipe_jax.loader import ConfigError, compare, dump, load
from gpipe_jax.mesh import make_mesh, simulate_devices
from gpipe_jax.pipeline import Pipeline
from gpipe_jax.trainer import Trainer, TrainState


class Parts(NamedTuple):
    """What a config describes."""

    config: Config
    workdir: Path
    dataset: data.Dataset
    trainer: Trainer


class Summary(NamedTuple):
    """What a run came to."""

    figures: dict  # what `--json` prints
    note: str  # where the curves are, or why there are none


def assemble(config: Config, workdir: Path) -> Parts:
    """Data, network, mesh, pipeline and optimizer of a config; trains nothing.

    Raises `build.SectionError`: until the first step, what is wrong is the config.
    """
    if config.mesh.simulate:
        simulate_devices(config.mesh.simulate)
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
        return Parts(config, workdir, dataset, Trainer(pipe, tx, ema=config.optimizer.ema))


def train(parts: Parts, show: Callable[[dict], None]) -> Summary:
    """Train to the end, from the newest checkpoint if there is one.

    `show` gets every record: of each step, and of each evaluation.
    """
    started, trainer, config = time.perf_counter(), parts.trainer, parts.config
    claim(parts)
    current = _newest(parts) or trainer.init(config.train.seed)
    log = _Log(parts.workdir / "metrics.jsonl", config.train.log_every, current.step, show)
    batches = parts.dataset.train(current.step)
    while current.step < config.train.steps:
        stop = min(_next_multiple(current.step, config.train.eval_every), config.train.steps)
        current = trainer.fit(current, batches, stop, log.step)
        figures = _evaluate(parts, current)
        trainer.check_finite("held-out loss", current.step, figures["test_loss"])
        log.evaluation({"step": current.step, **figures})
        checkpoint.save(_checkpoints(parts), current.step, trainer.to_layers(current))
    final = _evaluation_at(current.step, log.records) or _evaluate(parts, current)
    figures = _figures(parts, final, log.records, current.step, time.perf_counter() - started)
    return Summary(figures, _draw(parts, log.records))


def evaluate(parts: Parts) -> Summary:
    """Evaluate the newest checkpoint of a run on its held-out data."""
    started = time.perf_counter()
    # On other data, or another split of it, the held-out examples may have been trained on.
    _check_same(parts, only=("model.", "data.", "train.seed:"))
    current = _newest(parts)
    if current is None:
        problem = "there is no checkpoint to evaluate; train it first (gpipe train)"
        raise ConfigError([problem], str(parts.workdir))
    figures = _evaluate(parts, current)
    records = list(_read(parts.workdir / "metrics.jsonl"))
    figures = _figures(parts, figures, records, current.step, time.perf_counter() - started)
    return Summary(figures, f"checkpoint: step {current.step}")


def claim(parts: Parts) -> None:
    """Make the working folder this run's own; ConfigError if another config's run is in it."""
    _check_same(parts)
    # With the folder's own name, so that its config.yaml is the config of this very run.
    train = parts.config.train.model_copy(update={"workdir": str(parts.workdir)})
    try:
        parts.workdir.mkdir(parents=True, exist_ok=True)
        text = dump(parts.config.model_copy(update={"train": train}))
        _replace(parts.workdir / "config.yaml", text)
    except OSError as error:
        problem = f"cannot write here ({error}); use another folder (train.workdir=...)"
        raise ConfigError([problem], str(parts.workdir)) from error


def _check_same(parts: Parts, only: tuple[str, ...] = ("",)) -> None:
    """Raise ConfigError if the working folder's run differs in settings that start with `only`."""
    path = parts.workdir / "config.yaml"
    # A run that never came to a checkpoint has nothing to lose, nor to continue.
    begun = path.exists() and checkpoint.latest_step(_checkpoints(parts)) is not None
    lines = compare(load(path), parts.config) if begun else []
    different = [n for n in lines if n.startswith(only) and not n.startswith("train.workdir:")]
    if different:
        rule = "this folder holds a run of another config; use another (train.workdir=...)"
        raise ConfigError([rule, *different], str(parts.workdir))


def _replace(path: Path, text: str) -> None:
    """Write a file at once: a cut must not leave half of it."""
    new = path.with_name(path.name + ".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _checkpoints(parts: Parts) -> Path:
    return parts.workdir / "checkpoints"


def _newest(parts: Parts) -> TrainState | None:
    step = checkpoint.latest_step(_checkpoints(parts))
    if step is None:
        return None
    try:
        saved = checkpoint.restore(_checkpoints(parts), step, parts.trainer.layer_shapes())
    except ValueError as error:
        raise ConfigError([str(error)], str(parts.workdir)) from error
    return parts.trainer.from_layers(saved, step)


def _evaluate(parts: Parts, current: TrainState) -> dict[str, float]:
    trainer = parts.trainer
    figures = trainer.evaluate(trainer.evaluated(current), parts.dataset.test())
    if isinstance(parts.config.data, TextConfig):
        figures["bits_per_byte"] = figures["test_loss"] / float(np.log(2))
    return figures


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def _evaluation_at(step: int, records: list[dict]) -> dict | None:
    found = [r for r in records if r["step"] == step and "test_loss" in r]
    return {k: v for k, v in found[-1].items() if k != "step"} if found else None


def _draw(parts: Parts, records: list[dict]) -> str:
    picture = parts.workdir / "curves.png"
    if not records:
        return "no curves: metrics.jsonl is gone"
    try:
        plots.curves(records, picture)
    except ImportError as error:
        return f"no curves: {error}"
    return f"curves: {picture}"


def _figures(parts: Parts, final: dict, records: list[dict], steps: int, wall_s: float) -> dict:
    pipe, times = parts.trainer.pipe, [r["step_time_s"] for r in records if "step_time_s" in r]
    return {
        **final,
        "steps": steps,
        "step_time_s": statistics.median(times) if times else None,
        "wall_s": wall_s,
        "workdir": str(parts.workdir),
        "stages": pipe.stages.last + 1,
        "parameters": sum(a.size for s in pipe.shapes for a in jax.tree.leaves(s.params)),
        "bubble_fraction": pipe.schedule.bubble_fraction,
        "device": f"{jax.devices()[0].platform} x {pipe.mesh.size}",
    }


class _Log:
    """The metrics file: every `log_every`-th step and every evaluation, one JSON object a line."""

    def __init__(self, path: Path, log_every: int, step: int, show: Callable[[dict], None]) -> None:
        self.path, self.log_every, self.show = path, log_every, show
        # What was written after the checkpoint that the run continues from will be written again.
        self.records = [r for r in _read(path) if r["step"] <= step]
        _replace(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def step(self, record: dict) -> None:
        self.show(record)
        if record["step"] % self.log_every == 0 or record["step"] == 1:
            self._write(record)

    def evaluation(self, record: dict) -> None:
        self.show(record)
        self._write(record)

    def _write(self, record: dict) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _read(path: Path) -> Iterator[dict]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # a run that was cut off may have left half a line: the last


def default_workdir(source: Any) -> Path:
    """runs/<name of the config file>."""
    return Path("runs") / Path(str(source)).stem
