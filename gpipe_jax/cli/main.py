"""The command line: `gpipe train | eval | export | plan | schedule | config`.

Exit codes: 0 done, 2 bad input (do not retry), 75 preempted after a save (start it again), 1
anything else.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpipe_jax.config import loader
from gpipe_jax.config.loader import ConfigError
from gpipe_jax.schedules import schedule
from gpipe_jax.utils import console, progress
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
    one.add_argument("--kind", default="1f1b", choices=schedule.KINDS)
    one.add_argument("--chunks", type=int, default=1, metavar="V", help="stages on each device")
    one.add_argument("--png", type=Path, metavar="FILE", help="draw it as a picture too")
    return parser


def _host_options(one: argparse.ArgumentParser) -> None:
    """On TPU pods, with Slurm and MPI, JAX finds these itself."""
    one.add_argument("--coordinator", metavar="HOST:PORT", help="of the first of several processes")
    one.add_argument("--processes", type=int, metavar="N", help="how many there are")
    one.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


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


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A function of `gpipe_jax.cli.main.run`, which imports JAX: not before it is called."""

    def command(options: argparse.Namespace) -> int:
        from gpipe_jax.cli import run

        return getattr(run, name)(options)

    return command


def _plan(options: argparse.Namespace) -> int:
    config = loader.load(options.config, options.overrides)
    os.environ["JAX_PLATFORMS"] = "cpu"  # no device is used here; a TPU's library says much
    from gpipe_jax.planner import plan_file, planner
    from gpipe_jax.tpu_compiler import libtpu
    from gpipe_jax.training import from_config

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
    except from_config.SectionError as error:
        place = loader.place(options.config, options.overrides, error.section, str(error))
        raise ConfigError([f"{place}: {error}"], options.config) from error
    except (ValueError, libtpu.NotInstalledError) as error:
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


def _config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(loader.schema(), indent=None if options.json else 2))
        return 0
    if options.config is None:
        return fail("give a CONFIG file, or --schema", BAD_INPUT)
    config = loader.load(options.config, options.overrides)
    for line in loader.without_effect(config):
        console.say(line)
    if options.diff:
        different = loader.differences(config)
        if options.json:
            print(json.dumps({k: {"default": a, "value": b} for k, (a, b) in different.items()}))
        else:
            for name, (default, value) in different.items():
                print(f"{name}: {value} (default {default})")
    elif options.json:
        print(config.model_dump_json())
    else:
        print(loader.dump(config), end="")
    return 0


def _schedule(options: argparse.Namespace) -> int:
    try:
        plan = schedule.make(options.kind, options.stages, options.micro_batches, options.chunks)
    except ValueError as error:
        raise ConfigError([str(error)], "gpipe schedule") from error
    figures = {
        "kind": plan.kind,
        "stages": plan.stages,
        "micro_batches": plan.micro_batches,
        "chunks": plan.chunks,
        "ticks": plan.ticks,
        "bubble_fraction": plan.bubble_fraction,
        "peak_stash": plan.peak_stash,
        **_times(plan),
    }
    print(plan)
    print(progress.table(figures))
    print(_TIMES)
    if options.png:
        from gpipe_jax import plots

        try:
            plots.schedule(plan, options.png)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError([str(error)], f"--png {options.png}") from error
        print(f"picture: {options.png}")
    if options.json:
        print(json.dumps(figures))
    return 0


_TIMES = """\
times: through all of a device's chunks a forward takes 1, a backward, which recomputes it, 3; in
lockstep a tick lasts as long as its slowest operation, as it does in one program on all devices"""


def _times(plan: schedule.Schedule) -> dict[str, float]:
    """Time of the schedule, in the unit that `_TIMES` says."""
    forward = [1 / plan.chunks] * (plan.stages * plan.chunks)
    backward = [3 * time for time in forward]
    if plan.kind == "forward":
        backward = [0.0 for _ in forward]
    else:
        forward[-1] = 0.0  # the last stage's is part of its backward
    return {
        "time_lockstep": schedule.simulate(plan, forward, backward).time,
        "time_asynchronous": schedule.simulate(plan, forward, backward, lockstep=False).time,
    }


if __name__ == "__main__":
    sys.exit(main())
