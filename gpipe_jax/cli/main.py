"""The command line: `gpipe train | eval | export | plan | schedule | config`.

Exit codes: 0 done, 2 bad input (do not retry), 75 preempted after a save (start it again), 1
anything else.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpipe_jax.cli.plan import _plan, _plan_options
from gpipe_jax.cli.show import _config, _schedule
from gpipe_jax.errors import ConfigError
from gpipe_jax.schedules import generators
from gpipe_jax.utils import console
from gpipe_jax.utils.console import BAD_INPUT, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = console.parse(_parser(), arguments)
    try:
        return options.command(options)
    except ConfigError as error:
        return fail(error, BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpipe", description="Train a sequence of layers through a pipeline."
    )
    run = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "train a config's network; the same folder continues a run"
    one = console.add_command(run, "train", _later("train"), text)
    console.add_config(one)
    one.add_argument("--plan", type=Path, metavar="FILE", help="lay it out as planned")
    _host_options(one)

    text = "evaluate the newest checkpoint of a run"
    one = console.add_command(run, "eval", _later("evaluate"), text)
    console.add_config(one, "a YAML file, or the folder of a run")
    one.add_argument("--stages", type=int, metavar="K", help="evaluate on other stages")
    _host_options(one)

    text = "say whether a config's run fits a TPU slice, and how fast it would be"
    one = console.add_command(run, "plan", _plan, text)
    console.add_config(one)
    _plan_options(one)

    one = console.add_command(run, "config", _config, "show a config as resolved")
    console.add_config(one, required=False)
    one.add_argument("--diff", action="store_true", help="differences from the defaults only")
    one.add_argument("--schema", action="store_true", help="the JSON schema of all configs")

    text = "write a run's parameters as one plain file"
    one = console.add_command(run, "export", _later("export_run"), text)
    one.add_argument("run", metavar="RUN", help="the folder of a run")
    one.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="ends in .safetensors or .npz"
    )

    one = console.add_command(run, "schedule", _schedule, "draw a schedule")
    one.add_argument("--stages", type=int, required=True, metavar="K")
    one.add_argument("--micro-batches", type=int, required=True, metavar="M")
    one.add_argument("--kind", default="1f1b", choices=generators.KINDS)
    one.add_argument("--chunks", type=int, default=1, metavar="V", help="stages on each device")
    one.add_argument("--png", type=Path, metavar="FILE", help="draw it as a picture too")
    return parser


def _host_options(one: argparse.ArgumentParser) -> None:
    """On TPU pods, with Slurm and MPI, JAX finds these itself."""
    one.add_argument("--coordinator", metavar="HOST:PORT", help="of the first of several processes")
    one.add_argument("--processes", type=int, metavar="N", help="how many there are")
    one.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A function of `gpipe_jax.cli.main.run`, which imports JAX: not before it is called."""

    def command(options: argparse.Namespace) -> int:
        from gpipe_jax.cli import run

        return getattr(run, name)(options)

    return command


if __name__ == "__main__":
    sys.exit(main())
