"""Run `gpipe schedule` and `gpipe config`: show a schedule or a configuration."""

import argparse
import json

from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from gpipe_jax.schedules import generators, schedule, simulation
from gpipe_jax.utils import console, progress
from gpipe_jax.utils.console import BAD_INPUT, fail


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
        plan = generators.make(options.kind, options.stages, options.micro_batches, options.chunks)
    except ValueError as error:
        raise ConfigError([str(error)], "gpipe schedule") from error
    figures = {
        "kind": plan.kind,
        "stages": plan.num_devices,
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
    forward = [1 / plan.chunks] * (plan.num_devices * plan.chunks)
    backward = [3 * time for time in forward]
    if plan.kind == "forward":
        backward = [0.0 for _ in forward]
    else:
        forward[-1] = 0.0  # the last stage's is part of its backward
    return {
        "time_lockstep": simulation.simulate(plan, forward, backward).time,
        "time_asynchronous": simulation.simulate(plan, forward, backward, lockstep=False).time,
    }
