"""Run `gpipe train`: train a config's network, or resume the run in its folder."""

import argparse
from typing import TYPE_CHECKING

from gpipe_jax import progress
from gpipe_jax.config import loader, trusted_code
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import say

if TYPE_CHECKING:
    from gpipe_jax.distributed.preemption import StopRequest
    from gpipe_jax.training.from_config import Assembly
    from gpipe_jax.training.run import RunSummary


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "train a config's network; in the folder of an earlier run, resume it"
    command = console.add_command(commands, "train", run, text)
    console.add_config(command, console.CONFIG_RUNS_CODE)
    console.complete_files(
        command.add_argument(
            "--plan",
            type=console.path,
            metavar="FILE",
            help="use the layout of a plan (gpipe plan --out)",
        )
    )
    add_process_options(command)


def add_process_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the cluster, which JAX detects on TPU pods and under Slurm and MPI."""
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of the first of several processes"
    )
    command.add_argument("--processes", type=int, metavar="N", help="number of processes")
    command.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def run(options: argparse.Namespace) -> int:
    """Train a config's network; resume the run in its folder, if there is one."""
    # These import JAX, which the other commands do not need.
    from gpipe_jax.cli.run import run_action
    from gpipe_jax.distributed import processes
    from gpipe_jax.training.run import train

    predicted_s = None
    if options.plan:
        from gpipe_jax.planner import plan_file

        options.overrides = plan_file.overrides(options.plan, options.config, options.overrides)
        predicted_s = plan_file.step_time_s(options.plan)

    def action(assembly: "Assembly", stop: "StopRequest") -> "RunSummary":
        config = assembly.config.train
        trusted_code.remember(assembly.config)
        for line in loader.without_effect(assembly.config) if processes.is_first() else ():
            say(line)
        quiet = not processes.is_first()
        with progress.show(config.steps, config.log_every, quiet=quiet) as show:
            summary = train(assembly, show, stop)
        return summary._replace(figures={**summary.figures, "predicted_step_time_s": predicted_s})

    return run_action(options, action)
