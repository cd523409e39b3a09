"""`gpipe train`, `eval` and `export`: from the command line's options to an exit code."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from gpipe_jax import data, errors
from gpipe_jax.checkpoint import export
from gpipe_jax.config import loader
from gpipe_jax.config.run import Config
from gpipe_jax.distributed import cluster
from gpipe_jax.distributed import processes as hosts
from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.distributed.preemption import PREEMPTED, Stop, listening
from gpipe_jax.errors import ConfigError, DivergedError, StoppedError
from gpipe_jax.training import run
from gpipe_jax.utils import console, progress
from gpipe_jax.utils.console import BAD_INPUT, fail

Work = Callable[[run.Assembly, Stop], run.RunSummary]


def train(options: argparse.Namespace) -> int:
    """Train a config's network, or go on with it."""
    predicted_s = None
    if options.plan:
        from gpipe_jax.planner import plan_file

        options.overrides = plan_file.overrides(options.plan, options.config, options.overrides)
        predicted_s = plan_file.step_time_s(options.plan)

    def work(parts: run.Assembly, stop: Stop) -> run.RunSummary:
        config = parts.config.train
        for line in loader.without_effect(parts.config) if hosts.is_first() else ():
            console.say(line)
        with progress.show(config.steps, config.log_every, quiet=not hosts.is_first()) as show:
            summary = run.train(parts, show, stop)
        return summary._replace(figures={**summary.figures, "predicted_step_time_s": predicted_s})

    return _run(options, work)


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the newest whole checkpoint of a config's run, or of a run's folder."""
    folder = epath.Path(options.config)
    try:
        is_run = folder.is_dir()
    except ImportError as error:
        raise ConfigError([loader.no_package(error)], options.config) from error
    if is_run:
        if not (folder / "config.yaml").exists():
            problem = "there is no config.yaml here; give the folder of a run, or a YAML file"
            raise ConfigError([problem], options.config)
        options.config = str(folder / "config.yaml")
        options.overrides = [f"train.workdir={json.dumps(str(folder))}", *options.overrides]
    if options.stages is not None:
        stages = [f"mesh.stages={options.stages}", "pipeline.partition=auto"]
        options.overrides = [*stages, *options.overrides]
    options.overrides = [*options.overrides, "train.writers=[]"]  # what they need is not needed
    return _run(options, run.evaluate)


def _run(options: argparse.Namespace, work: Work) -> int:
    config = loader.load(options.config, options.overrides)
    joined = _cluster(options, config)
    try:
        count = joined.count if joined else 1
        # From the start on, not from the first step: a signal that comes before is no failure.
        with hosts.together(joined), listening(count) as stop:
            return _one_of(options, config, work, stop, count)
    except ConfigError as error:
        if joined is None:
            raise
        code = fail(error, BAD_INPUT)
    except (errors.MissingProcessError, OSError) as error:
        code = fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if joined is None:
            raise
        code = fail(f"{joined.me}: {str(error).splitlines()[0]}", 1)
    return hosts.leave(code) if joined else code


def _cluster(options: argparse.Namespace, config: Config) -> Cluster | None:
    asked = (options.coordinator, options.processes, options.process)
    try:
        # Simulated devices are for one machine, whatever that is a part of.
        alone = config.mesh.simulate is not None and not cluster.is_asked(*asked)
        return None if alone else cluster.find(*asked)
    except ValueError as error:
        raise ConfigError([str(error)], "the command line") from error


def _one_of(
    options: argparse.Namespace, config: Config, work: Work, stop: Stop, processes: int
) -> int:
    """The command in one of so many processes. What all of them find is no error to the others."""
    workdir = config.train.workdir or run.default_workdir(options.config)
    try:
        parts = run.assemble(config, workdir, processes)
    except errors.SectionError as error:
        place = loader.place(options.config, options.overrides, error.section, str(error))
        raise ConfigError([f"{place}: {error}"], options.config) from error
    if not hosts.all_have(json.dumps([config.model_dump(mode="json"), parts.data])):
        problem = (
            "the hosts have not all the same: give every one the same config, overrides and data"
        )
        raise ConfigError([problem], options.config)
    if hosts.is_first():
        print(parts.trainer.pipe, flush=True)
    try:
        summary = work(parts, stop)
    except StoppedError as error:
        return fail(error, PREEMPTED)
    except DivergedError as error:
        return fail(error, 1)
    except data.DataError as error:
        place = loader.place(options.config, options.overrides, "data", str(error))
        raise ConfigError([f"{place}: {error}"], options.config) from error
    if hosts.is_first():
        print(progress.table(summary.figures))
        print(summary.note)
        if options.json:
            print(json.dumps(summary.figures))
    return 0


def export_run(options: argparse.Namespace) -> int:
    """Write a run's parameters as one plain file."""
    figures = export.export(epath.Path(options.run), Path(options.out))
    print(progress.table(figures))
    if options.json:
        print(json.dumps(figures))
    return 0
