"""Run `gpipe plan`: say whether a run fits a TPU slice, and how fast it would be."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from gpipe_jax import errors
from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from gpipe_jax.utils import progress
from gpipe_jax.utils.console import BAD_INPUT, fail


def _plan_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        *("--topology", "--accelerator"),
        metavar="T",
        help="as v3:4x4, or a Cloud name as v3-32; without one nothing is compiled",
    )
    one.add_argument("--slices", type=int, default=1, metavar="N", help="how many such slices")
    one.add_argument("--search", action="store_true", help="try other layouts, the best first")
    one.add_argument(
        "--compile-best", type=int, default=3, metavar="N", help="how many of them to compile"
    )
    one.add_argument(
        "--cost", choices=["cycles"], help="balance the stages by their layers' compiled times"
    )
    one.add_argument("--timeout", type=float, metavar="S", help="of each compilation, in seconds")
    one.add_argument("--out", type=Path, metavar="FILE", help="write the (best) plan, for train")
    one.add_argument("--png", type=Path, metavar="FILE", help="draw it as a picture too")


def _plan(options: argparse.Namespace) -> int:
    config = loader.load(options.config, options.overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is used here; a TPU's library says much
    from gpipe_jax.planner import plan_file, planner

    problem = _misused(options)
    if problem:
        raise ConfigError([problem], options.config)
    named = {"slices": options.slices, "timeout_s": options.timeout, "show": progress.passing()}
    try:
        if options.search:
            found = planner.search(
                config, topology=options.topology, compile_best=options.compile_best, **named
            )
            best = found.plans[0]
        else:
            best = found = planner.plan(
                config, topology=options.topology, cost=options.cost, **named
            )
    except errors.SectionError as error:
        place = loader.place(options.config, options.overrides, error.section, str(error))
        raise ConfigError([f"{place}: {error}"], options.config) from error
    except (ValueError, errors.CompilerNotInstalledError) as error:
        raise ConfigError([str(error)], options.config) from error
    except (TimeoutError, RuntimeError) as error:
        return fail(error, 1)
    print(found)
    code = 0
    if options.search and best.fits is not True:
        code = fail("none of the compiled layouts fits; try a larger topology", 1)
    else:
        files = {
            "plan": (options.out, lambda path: plan_file.save(best, path)),
            "picture": (options.png, best.plot),
        }
        for what, (path, write) in files.items():
            if path and not _written(what, path, write):
                code = BAD_INPUT
    if options.json:
        print(json.dumps(found.to_dict()))
    return code


def _written(what: str, path: Path, write: Callable[[Path], object]) -> bool:
    """Whether a file could be written: the rest of what took minutes is not lost if not."""
    try:
        write(path)
    except (OSError, ValueError, ImportError) as error:
        fail(f"no {what} {path}: {error}", BAD_INPUT)
        return False
    print(f"{what}: {path}")
    return True


def _misused(options: argparse.Namespace) -> str | None:
    """What is wrong with the options of a plan, found before minutes are spent on it."""
    if options.search and options.topology is None:
        return "--search needs a --topology to search for"
    if options.search and options.cost:
        return "--cost does not go with --search, which compiles what it has cut by operations"
    if options.slices != 1 and options.topology is None:
        return f"--slices {options.slices} needs a --topology, of which they are"
    for name, path in (("--out", options.out), ("--png", options.png)):
        if path and not path.absolute().parent.is_dir():
            return f"{name} {path}: there is no folder {path.absolute().parent}; make it first"
    return None
