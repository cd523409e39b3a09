"""Run `gpipe plan`: predict whether a run fits a TPU slice, and how fast it is."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpipe_jax import progress
from gpipe_jax.config import loader
from gpipe_jax.config.run import PLACES
from gpipe_jax.errors import (
    ArgumentError,
    CompilerNotInstalledError,
    ConfigError,
    OptionError,
    SectionError,
)
from gpipe_jax.utils import console
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.messages import BAD_INPUT, answer, fail, write


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "predict whether a config's run fits a TPU slice, and how fast it is"
    command = console.add_command(commands, "plan", run, text)
    console.add_config(command, console.CONFIG_RUNS_CODE)
    command.add_argument(
        *("--topology", "--accelerator"),
        metavar="T",
        help="such as v3:4x4, or a Cloud name such as v3-32; without one nothing is compiled",
    )
    command.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices")
    command.add_argument(
        "--search", action="store_true", help="compare all layouts, the fastest first"
    )
    command.add_argument(
        "--compile-best", type=int, default=3, metavar="N", help="number of layouts to compile"
    )
    command.add_argument(
        "--cost", choices=["cycles"], help="balance the stages by their layers' compiled times"
    )
    command.add_argument(
        "--timeout", type=float, metavar="S", help="limit of each compilation, in seconds"
    )
    command.add_argument(
        "--out",
        type=console.path,
        metavar="FILE",
        help="write the (best) plan, for gpipe train --plan",
    )
    command.add_argument(
        "--png", type=console.path, metavar="FILE", help="draw it as a picture too"
    )


def run(options: argparse.Namespace) -> int:
    """Predict, print and write."""
    config = loader.load(options.config, options.overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is used here; a TPU's library logs a lot
    from gpipe_jax.planner import plan_file, planner

    _check_options(options)
    arguments = {
        "topology": options.topology,
        "slices": options.slices,
        "timeout_s": options.timeout,
        "show": progress.passing(),
    }
    try:
        with loader.locating(options.config, options.overrides), _placed():
            if options.search:
                result = planner.search(config, compile_best=options.compile_best, **arguments)
                best = result.plans[0]
            else:
                best = result = planner.plan(config, cost=options.cost, **arguments)
    except (ConfigError, OptionError):
        raise
    except CompilerNotInstalledError as error:
        raise OptionError("--topology", str(error)) from error
    except ValueError as error:
        raise ConfigError([str(error)], options.config) from error
    except (TimeoutError, RuntimeError) as error:
        return fail(error, 1)
    write(result)
    code = 0
    if options.search and best.fits is not True:
        code = fail("none of the compiled layouts fits; try a larger topology", 1)
    else:
        files = {
            "plan": (options.out, lambda path: plan_file.save(best, path)),
            "picture": (options.png, best.plot),
        }
        for noun, (path, save) in files.items():
            if path and not _save(noun, path, save):
                code = BAD_INPUT
    answer(result.to_dict())
    return code


@contextlib.contextmanager
def _placed() -> Iterator[None]:
    """Turn an ArgumentError of the block into an error of the option, or of the config's section.

    Any other argument is one of a pipeline, as in `gpipe train`.
    """
    options = {"topology": "--topology", "slices": "--slices", "cost": "--cost"}
    try:
        yield
    except ArgumentError as error:
        if error.argument in options:
            raise OptionError(options[error.argument], str(error)) from error
        place = PLACES.get(error.argument, f"pipeline.{error.argument}")
        name, _, field = place.partition(".")
        raise SectionError(name, field, str(error)) from error


def _save(noun: str, path: Path, save: Callable[[Path], object]) -> bool:
    """Return whether a file could be written; if not, the rest of the results is not lost."""
    try:
        save(path)
    except (OSError, ValueError, ImportError) as error:
        fail(f"no {noun} {path}: {error}", BAD_INPUT)
        return False
    write(f"{noun}: {path}")
    return True


def _check_options(options: argparse.Namespace) -> None:
    """Raise OptionError for options that cannot be used, before minutes are spent on them."""
    from gpipe_jax.tpu_compiler import topologies

    if options.topology is not None:
        with console.option("--topology", slices="--slices"):
            topologies.parse(options.topology, options.slices)
    elif options.search:
        raise OptionError("--search", "needs a --topology to search for")
    elif options.cost:
        raise OptionError("--cost", "cycles needs a --topology to compile for, such as v3:4x4")
    elif options.slices != 1:
        raise OptionError("--slices", "needs a --topology")
    if options.search and options.cost:
        problem = "cannot be combined with --search, which balances layouts by operations"
        raise OptionError("--cost", problem)
    if options.search:
        with console.option("--compile-best"):
            check_count("compile_best", options.compile_best)
    if options.timeout is not None and not 0 < options.timeout < math.inf:
        problem = f"must be a number of seconds above 0, got {options.timeout}; or leave it out"
        raise OptionError("--timeout", problem)
    for name, path in (("--out", options.out), ("--png", options.png)):
        if path and not path.absolute().parent.is_dir():
            folder = path.absolute().parent
            raise OptionError(name, f"{path}: there is no folder {folder}; make it first")
        if path and path.is_dir():
            raise OptionError(name, f"{path} is a folder; give the path of a file")
