"""Run an action of a training run in one process or several: from options to an exit code."""

import argparse
import json
from collections.abc import Callable

import jax

from gpipe_jax.config import loader
from gpipe_jax.config.base import section
from gpipe_jax.config.run import Config
from gpipe_jax.distributed import cluster, processes
from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.distributed.preemption import (
    PREEMPTED,
    StopRequest,
    handle_signals,
    ignore_signals,
)
from gpipe_jax.errors import (
    ConfigError,
    DataError,
    DivergedError,
    MissingProcessError,
    StoppedError,
)
from gpipe_jax.training import from_config, run
from gpipe_jax.training.from_config import Assembly
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import BAD_INPUT, answer, fail, write
from gpipe_jax.utils.text import figures_table

Action = Callable[[Assembly, StopRequest], run.RunSummary]


def run_action(options: argparse.Namespace, action: Action) -> int:
    """Run an action of a config in one process, or as one of several; return the exit code."""
    config = loader.load(options.config, options.overrides)
    try:
        joined = _cluster(options, config)
    except OSError as error:  # of the network, while the cluster is detected
        return fail(error, 1)
    try:
        count = joined.num_processes if joined else 1
        # From the start, not from the first step: an earlier signal is no failure either.
        with processes.connected(joined), handle_signals(count) as stop:
            code = _run_in_process(options, config, action, stop, count)
            if stop.is_requested:
                ignore_signals()  # supervisors repeat them
            return code
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
        problem = "the hosts differ; give every host the same config, overrides and data"
        raise ConfigError([problem], options.config)
    with loader.locating(options.config, options.overrides), section("data"):
        from_config.check_same_inputs(assembly.dataset)
    if processes.is_first():
        write(assembly.trainer.pipe)
    try:
        with loader.locating(options.config, options.overrides):
            summary = action(assembly, stop)
    except StoppedError as error:
        return fail(error, PREEMPTED)
    except DivergedError as error:
        return fail(error, 1)
    except DataError as error:
        with loader.locating(options.config, options.overrides), section("data"):
            raise error
    if processes.is_first():
        write(figures_table(summary.figures))
        write(summary.note)
        answer(summary.figures)
    return 0
