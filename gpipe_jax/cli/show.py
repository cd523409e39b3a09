"""Run `gpipe schedule` and `gpipe config`: show a schedule or a configuration."""

import argparse
import json
import reprlib
import shutil

from pydantic_core import to_jsonable_python

from gpipe_jax.config import loader
from gpipe_jax.config.base import Section
from gpipe_jax.errors import OptionError
from gpipe_jax.schedules import generators, simulation
from gpipe_jax.schedules.schedule import Schedule, render
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import BAD_INPUT, answer, fail, say, write
from gpipe_jax.utils.text import figures_table

# --- gpipe config ---------------------------------------------------------------------------------


def add_config_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command `config`."""
    command = console.add_command(commands, "config", config, "show a config as resolved")
    console.add_config(command, required=False)
    command.add_argument(
        "--diff", action="store_true", help="show only differences from the defaults"
    )
    command.add_argument("--schema", action="store_true", help="show the JSON schema of configs")


def config(options: argparse.Namespace) -> int:
    """Show a configuration, or the schema of all."""
    if options.schema:
        write(json.dumps(loader.schema(), indent=None if options.json else 2))
        return 0
    if options.config is None:
        return fail("give a CONFIG file, or --schema", BAD_INPUT)
    resolved = loader.load(options.config, options.overrides)
    for line in loader.without_effect(resolved):
        say(line)
    if options.diff:
        changed = loader.non_defaults(resolved)
        if options.json:
            pairs = {k: {"default": a, "value": b} for k, (a, b) in changed.items()}
            write(json.dumps(to_jsonable_python(pairs)))
        else:
            for name, (default, value) in changed.items():
                write(f"{name}: {_plain(value)} (default {default})")
    elif options.json:
        write(resolved.model_dump_json())
    else:
        write(loader.dump(resolved), end="")
    return 0


def _plain(value: object) -> object:
    """Return a setting as it is printed; one of several fields as a mapping, as in the file."""
    is_nested = isinstance(value, tuple) and any(isinstance(item, Section) for item in value)
    return to_jsonable_python(value, exclude_none=True) if is_nested else value


# --- gpipe schedule -------------------------------------------------------------------------------


def add_schedule_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command `schedule`."""
    command = console.add_command(commands, "schedule", schedule, "draw a schedule")
    command.add_argument("--stages", type=int, required=True, metavar="K", help="devices")
    command.add_argument(
        "--micro-batches", type=int, required=True, metavar="M", help="micro-batches of a step"
    )
    command.add_argument(
        "--kind", default="1f1b", choices=generators.KINDS, help="which schedule (1f1b)"
    )
    command.add_argument("--chunks", type=int, default=1, metavar="V", help="stages on each device")
    command.add_argument(
        "--png", type=console.path, metavar="FILE", help="draw it as a picture too"
    )


def schedule(options: argparse.Namespace) -> int:
    """Draw a schedule, with its figures."""
    with console.option(
        "--kind", num_devices="--stages", micro_batches="--micro-batches", chunks="--chunks"
    ):
        drawn = generators.make(options.kind, options.stages, options.micro_batches, options.chunks)
    figures = {
        "kind": drawn.kind,
        "stages": drawn.num_devices,
        "micro_batches": drawn.micro_batches,
        "chunks": drawn.chunks,
        "ticks": drawn.ticks,
        "bubble_fraction": drawn.bubble_fraction,
        "peak_stash": drawn.peak_stash,
        **_times(drawn),
    }
    write(render(drawn, shutil.get_terminal_size((100, 24)).columns))
    write(figures_table({**figures, "peak_stash": _LISTED.repr(drawn.peak_stash)}))
    write(_TIMES)
    if options.png:
        from gpipe_jax import plots

        try:
            plots.schedule(drawn, options.png)
        except (OSError, ValueError, ImportError) as error:
            raise OptionError("--png", f"{options.png}: {error}") from error
        write(f"picture: {options.png}")
    answer(figures)
    return 0


_LISTED = reprlib.Repr()
_LISTED.maxlist = 16  # numbers of a list in a line; the first device has most to stash

_TIMES = """\
times: through all chunks of a device, a forward takes 1 and a backward, which recomputes it, 3; in
lockstep a tick lasts as long as its slowest operation, as in one program on all devices"""


def _times(drawn: Schedule) -> dict[str, float]:
    """Return the time of the schedule, in the unit that `_TIMES` defines."""
    forward, backward = simulation.usual_times(drawn)
    return {
        "time_lockstep": simulation.simulate(drawn, forward, backward).time,
        "time_asynchronous": simulation.simulate(drawn, forward, backward, lockstep=False).time,
    }
