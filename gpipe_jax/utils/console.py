"""What the command lines share: how they are read, and what is said to stderr.

No JAX here: what is wrong with an option is said at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

BAD_INPUT = 2  # exit code: do not retry


def say(text: object, program: str = "gpipe") -> None:
    """One line to stderr."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def fail(error: object, code: int, program: str = "gpipe") -> int:
    """Say what is wrong, and return the exit code."""
    say(error, program)
    return code


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options; overrides may stand before, between and after them, which argparse refuses."""
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if "=" not in text]
    if unknown or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    """The parser of one command, which `options.command` then calls."""
    one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    one.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    one.set_defaults(command=command)
    return one


def add_config(
    one: argparse.ArgumentParser, text: str = "a YAML file", *, required: bool = True
) -> None:
    """A config, and overrides of it."""
    one.add_argument("config", metavar="CONFIG", nargs=None if required else "?", help=text)
    one.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace the file's")
