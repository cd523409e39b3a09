"""Build the command lines of `gpipe` and `nas`: their parsers and shared options.

No JAX here, so that a mistake in an option is reported at once.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from gpipe_jax.errors import ArgumentError, ConfigError, OptionError
from gpipe_jax.utils import paths
from gpipe_jax.utils.messages import BAD_INPUT, note_failure, printable
from gpipe_jax.utils.text import did_you_mean

# --- parsers --------------------------------------------------------------------------------------


class _Version(argparse.Action):
    """Print the version; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata  # takes longer than the rest of a short command

        print(f"{parser.prog} {importlib.metadata.version('gpipe-jax')}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Suggest a legal choice in place of one that is unknown, also for commands."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        note_failure(message, BAD_INPUT)
        super().error(printable(message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            suggestion = did_you_mean(value, [str(choice) for choice in action.choices or ()])
            raise argparse.ArgumentError(action, f"{error.message}{suggestion}") from None


def new_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a program, with `--version` and `--print-completion`."""
    parser = _Parser(prog=program, description=description)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    text = 'print a completion script and exit; use: eval "$(%(prog)s --print-completion bash)"'
    shtab.add_argument_to(parser, "--print-completion", text)
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the arguments; overrides may stand before, between and after options.

    `argparse` alone would refuse that.
    """
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if "=" not in text]
    if unknown or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def wants_json(arguments: Sequence[str] | None = None) -> bool:
    """Return whether the arguments have the option `--json`, before they are parsed."""
    given = sys.argv[1:] if arguments is None else arguments
    return any(len(text) > 2 and "--json".startswith(text) for text in given)


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    """Add a command: `options.command` is the function to call, `options.command_name` the name."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.set_defaults(command=command, command_name=name)
    return parser


CONFIG_RUNS_CODE = "a YAML file; if it names Python code (data.source, model.function), it is run"


def add_config(
    parser: argparse.ArgumentParser, text: str = "a YAML file", *, required: bool = True
) -> None:
    """Add the arguments of a configuration: its file, and overrides."""
    nargs = None if required else "?"
    complete_files(parser.add_argument("config", metavar="CONFIG", nargs=nargs, help=text))
    # Without a default, argparse lists it among the required arguments.
    text = "settings that replace the file's"
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help=text)


def path(text: str) -> Path:
    """Return the path of an option, on this machine: `type=console.path`."""
    try:
        return paths.local("path", text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("`path` ")) from error


def complete_files(action: argparse.Action) -> None:
    """Let shells complete the names of files for an argument."""
    action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it


# --- mistakes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def option(name: str, **others: str) -> Iterator[None]:
    """Turn a ValueError of the block into an `OptionError` of the option `name`.

    A ConfigError passes: it names its own place. So do other errors, such as those of the network:
    the same command may succeed when it is tried again.

    Args:
        name: The option that the block uses, such as "--topology".
        **others: The options of further arguments, by the name in an `ArgumentError`:
            `slices="--slices"`.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        argument = error.argument if isinstance(error, ArgumentError) else ""
        raise OptionError(others.get(argument, name), str(error)) from error
