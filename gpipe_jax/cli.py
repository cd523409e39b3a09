"""The command line: `gpipe train | eval | schedule | config`.

Exit codes: 0 done, 2 bad input (do not retry), 1 anything else.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpipe_jax import loader, progress
from gpipe_jax import schedule as schedules
from gpipe_jax.loader import ConfigError

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parse(arguments)
    try:
        return options.command(options)
    except ConfigError as error:
        return _fail(error, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides may stand before, between and after them, which argparse refuses."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if "=" not in text]
    if unknown or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def _fail(error: object, code: int) -> int:
    print(f"gpipe: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpipe", description="Train a sequence of layers through a pipeline."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("train", _train, "train a config's network; the same folder continues a run"),
        ("eval", _evaluate, "evaluate the newest checkpoint of a config's run"),
        ("config", _config, "show a config as resolved"),
    ):
        one = _command(commands, name, command, text)
        needed = None if name != "config" else "?"
        one.add_argument("config", metavar="CONFIG", nargs=needed, help="a YAML file")
        one.add_argument(
            "overrides", metavar="a.b=c", nargs="*", help="values that replace the file's"
        )
        if name == "config":
            one.add_argument(
                "--diff", action="store_true", help="differences from the defaults only"
            )
            one.add_argument("--schema", action="store_true", help="the JSON schema of all configs")
    one = _command(commands, "schedule", _schedule, "draw a schedule")
    one.add_argument("--stages", type=int, required=True, metavar="K")
    one.add_argument("--micro-batches", type=int, required=True, metavar="M")
    one.add_argument("--kind", default="1f1b", choices=schedules.KINDS)
    one.add_argument("--chunks", type=int, default=1, metavar="V", help="stages on each device")
    one.add_argument("--png", type=Path, metavar="FILE", help="draw it as a picture too")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, command: Callable, text: str
) -> argparse.ArgumentParser:
    one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    one.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    one.set_defaults(command=command)
    return one


def _train(options: argparse.Namespace) -> int:
    return _run(options, "train")


def _evaluate(options: argparse.Namespace) -> int:
    return _run(options, "evaluate")


def _run(options: argparse.Namespace, action: str) -> int:
    config = loader.load(options.config, options.overrides)
    from gpipe_jax import build, run
    from gpipe_jax.trainer import DivergedError

    workdir = Path(config.train.workdir or run.default_workdir(options.config))
    try:
        parts = run.assemble(config, workdir)
    except build.SectionError as error:
        place = loader.place(options.config, options.overrides, error.section, str(error))
        raise ConfigError([f"{place}: {error}"], options.config) from error
    print(parts.trainer.pipe, flush=True)
    try:
        if action == "evaluate":
            summary = run.evaluate(parts)
        else:
            with progress.show(config.train.steps, config.train.log_every) as show:
                summary = run.train(parts, show)
    except DivergedError as error:
        return _fail(error, 1)
    print(progress.table(summary.figures))
    print(summary.note)
    if options.json:
        print(json.dumps(summary.figures))
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(loader.schema(), indent=None if options.json else 2))
        return 0
    if options.config is None:
        return _fail("give a CONFIG file, or --schema", BAD_INPUT)
    config = loader.load(options.config, options.overrides)
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
        plan = schedules.make(options.kind, options.stages, options.micro_batches, options.chunks)
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


def _times(plan: schedules.Schedule) -> dict[str, float]:
    """Time of the schedule, in the unit that `_TIMES` says."""
    forward = [1 / plan.chunks] * (plan.stages * plan.chunks)
    backward = [3 * time for time in forward]
    if plan.kind == "forward":
        backward = [0.0 for _ in forward]
    else:
        forward[-1] = 0.0  # the last stage's is part of its backward
    return {
        "time_lockstep": schedules.simulate(plan, forward, backward).time,
        "time_asynchronous": schedules.simulate(plan, forward, backward, lockstep=False).time,
    }


if __name__ == "__main__":
    sys.exit(main())
