"""Run the command line: `gpipe init | train | eval | export | plan | schedule | config`.

Exit codes: 0 done, 2 bad input (do not retry), 75 preempted after a save (start it again), 1
anything else.
"""

import argparse
from collections.abc import Sequence

from gpipe_jax.cli import evaluate, export, init, plan, show, train
from gpipe_jax.errors import ConfigError, OptionError
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import BAD_INPUT, answering, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with answering(console.wants_json(arguments)):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = console.parse(parser(), arguments)
    try:
        return options.command(options)
    except ConfigError as error:
        return fail(error, BAD_INPUT)
    except OptionError as error:
        return fail(error, BAD_INPUT, f"gpipe {options.command_name}")
    except SystemExit as error:  # no command exits so: a Python file that the config names does
        return fail(f"a Python file of the run ended the program (sys.exit({error.code!r}))", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `gpipe`."""
    program = console.new_parser("gpipe", "Train a sequence of layers through a pipeline.")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    init.add_parser(commands)
    train.add_parser(commands)
    evaluate.add_parser(commands)
    plan.add_parser(commands)
    show.add_config_parser(commands)
    export.add_parser(commands)
    show.add_schedule_parser(commands)
    return program
