"""Run `gpipe train`, `eval` and `export`: from the options to an exit code."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from gpipe_jax.checkpoint import export
from gpipe_jax.config import loader
from gpipe_jax.config.base import section
from gpipe_jax.config.run import Config
from gpipe_jax.distributed import cluster, processes
from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.distributed.preemption import PREEMPTED, StopRequest, handle_signals
from gpipe_jax.errors import (
    ConfigError,
    DataError,
    DivergedError,
    MissingProcessError,
    StoppedError,
)
from gpipe_jax.training import from_config, run
from gpipe_jax.training.from_config import Assembly
from gpipe_jax.utils import console, progress
from gpipe_jax.utils.messages import BAD_INPUT, fail, say
from gpipe_jax.utils.text import figures_table

Action = Callable[[Assembly, StopRequest], run.RunSummary]


def train(options: argparse.Namespace) -> int:
    """Train a config's network; resume the run in its folder, if there is one."""
    predicted_s = None
    if options.plan:
        from gpipe_jax.planner import plan_file

        options.overrides = plan_file.overrides(options.plan, options.config, options.overrides)
        predicted_s = plan_file.step_time_s(options.plan)

    def action(assembly: Assembly, stop: StopRequest) -> run.RunSummary:
        config = assembly.config.train
        for line in loader.without_effect(assembly.config) if processes.is_first() else ():
            say(line)
        quiet = not processes.is_first()
        with progress.show(config.steps, config.log_every, quiet=quiet) as show:
            summary = run.train(assembly, show, stop)
        return summary._replace(figures={**summary.figures, "predicted_step_time_s": predicted_s})

    return _run(options, action)


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the newest intact checkpoint of a config's run, or of a run's folder."""
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
    # The packages of writers are not needed here.
    options.overrides = [*options.overrides, "train.writers=[]"]
    return _run(options, run.evaluate)


def export_run(options: argparse.Namespace) -> int:
    """Write a run's parameters as one plain file."""
    with console.option("--out"):
        figures = export.export(epath.Path(options.run), Path(options.out))
    print(figures_table(figures))
    if options.json:
        print(json.dumps(figures))
    return 0


def _run(options: argparse.Namespace, action: Action) -> int:
    config = loader.load(options.config, options.overrides)
    try:
        joined = _cluster(options, config)
    except OSError as error:  # of the network, while the cluster is detected
        return fail(error, 1)
    try:
        count = joined.num_processes if joined else 1
        # From the start, not from the first step: an earlier signal is not a failure either.
        with processes.connected(joined), handle_signals(count) as stop:
            return _run_in_process(options, config, action, stop, count)
    except ConfigError as error:
        if joined is None:
            raise
        code = fail(error, BAD_INPUT)
    except (MissingProcessError, OSError) as error:
        code = fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if joined is None:
            raise
        code = fail(f"{joined.label}: {str(error).splitlines()[0]}", 1)
    return processes.exit_now(code) if joined else code


def _cluster(options: argparse.Namespace, config: Config) -> Cluster | None:
    given = (options.coordinator, options.processes, options.process)
    # Simulated devices are for one machine, even if that is part of a cluster.
    if config.mesh.simulate is not None and not cluster.is_requested(*given):
        return None
    with console.option(
        "--process",
        coordinator="--coordinator",
        num_processes="--processes",
        process_index="--process",
    ):
        return cluster.find(*given)


def _run_in_process(
    options: argparse.Namespace, config: Config, action: Action, stop: StopRequest, count: int
) -> int:
    """Run the command in one of `count` processes; an error in all of them is raised in each."""
    workdir = config.train.workdir or run.default_workdir(options.config)
    with loader.locating(options.config, options.overrides):
        assembly = from_config.assemble(config, workdir, count)
    if not processes.same_in_all(
        json.dumps([config.model_dump(mode="json"), assembly.data_identity])
    ):
        problem = (
            "the hosts do not have the same; give every host the same config, overrides and data"
        )
        raise ConfigError([problem], options.config)
    if processes.is_first():
        print(assembly.trainer.pipe, flush=True)
    try:
        summary = action(assembly, stop)
    except StoppedError as error:
        return fail(error, PREEMPTED)
    except DivergedError as error:
        return fail(error, 1)
    except DataError as error:
        with loader.locating(options.config, options.overrides), section("data"):
            raise error
    if processes.is_first():
        print(figures_table(summary.figures))
        print(summary.note)
        if options.json:
            print(json.dumps(summary.figures))
    return 0
