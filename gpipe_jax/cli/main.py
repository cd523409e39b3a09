"""Run the command line: `gpipe init | train | eval | export | plan | schedule | config`.

Exit codes: 0 done, 2 bad input (do not retry), 75 preempted after a save (start it again), 1
anything else.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gpipe_jax.cli import init, plan, show
from gpipe_jax.errors import ConfigError, OptionError
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import BAD_INPUT, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = console.parse(parser(), arguments)
    try:
        return options.command(options)
    except ConfigError as error:
        return fail(error, BAD_INPUT)
    except OptionError as error:
        return fail(error, BAD_INPUT, f"gpipe {options.command_name}")
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `gpipe`."""
    program = console.new_parser("gpipe", "Train a sequence of layers through a pipeline.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    init.add_parser(commands)
    _add_train(commands)
    _add_eval(commands)
    plan.add_parser(commands)
    show.add_config_parser(commands)
    _add_export(commands)
    show.add_schedule_parser(commands)
    return program


def _add_train(commands: argparse._SubParsersAction) -> None:
    text = "train a config's network; in the folder of an earlier run, resume it"
    command = console.add_command(commands, "train", _train, text)
    console.add_config(command)
    console.complete_files(
        command.add_argument(
            "--plan", type=Path, metavar="FILE", help="use the layout of a plan (gpipe plan --out)"
        )
    )
    _add_process_options(command)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    text = "evaluate the newest checkpoint of a run"
    command = console.add_command(commands, "eval", _evaluate, text)
    console.add_config(command, "a YAML file, or the folder of a run")
    command.add_argument("--stages", type=int, metavar="K", help="evaluate on other stages")
    _add_process_options(command)


def _add_export(commands: argparse._SubParsersAction) -> None:
    text = "write a run's parameters as one plain file"
    command = console.add_command(commands, "export", _export, text)
    console.complete_files(command.add_argument("run", metavar="RUN", help="the folder of a run"))
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="ends in .safetensors or .npz"
    )


def _add_process_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the cluster, which JAX detects on TPU pods and under Slurm and MPI."""
    command.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of the first of several processes"
    )
    command.add_argument("--processes", type=int, metavar="N", help="number of processes")
    command.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


# `cli.run` imports JAX: not before one of its commands is called.


def _train(options: argparse.Namespace) -> int:
    from gpipe_jax.cli import run

    return run.train(options)


def _evaluate(options: argparse.Namespace) -> int:
    from gpipe_jax.cli import run

    return run.evaluate(options)


def _export(options: argparse.Namespace) -> int:
    from gpipe_jax.cli import run

    return run.export_run(options)
