"""Write texts of programs to standard output and error, and name their exit codes.

What is printed may come from a file, an exception or another machine. It is escaped here, and only
here, because a terminal obeys control characters.

A command with `--json` ends its output with one object: its results, or what went wrong.
`answering` surrounds the command, `answer` gives the results, and `fail` the failures.
"""

import contextlib
import contextvars
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from gpipe_jax.errors import ConfigError

BAD_INPUT = 2  # exit code: do not retry

# Control characters except tab and newline, marks that change the direction of text, and unpaired
# surrogates, which no stream can encode.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object) -> str:
    r"""Return a text with escapes such as \x1b in place of what must not reach a terminal.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], str(text))


def write(text: object, *, end: str = "\n") -> None:
    """Write a result to standard output."""
    _print(printable(text), sys.stdout, end)


def say(text: object, program: str = "gpipe") -> None:
    """Write one line to standard error."""
    _print(f"{program}: {printable(text)}", sys.stderr)


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print a text, with escapes for what the stream cannot encode.

    If the reader of the stream has ended, as `head` does, discard the rest: a run must not end, and
    files must be written, whoever reads its output.
    """
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def fail(error: object, code: int, program: str = "gpipe") -> int:
    """Write what is wrong to standard error; return the exit code."""
    say(error, program)
    note_failure(error, code)
    return code


# --- one JSON object ------------------------------------------------------------------------------


class _Answer:
    """Hold the failures of a command with `--json`, until its object is written."""

    def __init__(self) -> None:
        self.failures: list[dict] = []
        self.is_written = False

    def write(self, results: Mapping[str, Any]) -> None:
        """Write the object; a failure is its value "error"."""
        error = {"error": self.failures[0]} if self.failures else {}
        write(json.dumps({**results, **error}))
        self.is_written = True


_ANSWER: contextvars.ContextVar[_Answer | None] = contextvars.ContextVar("answer", default=None)


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Let the block, a command, end with one JSON object if `as_json`, also if it fails."""
    if not as_json:
        yield
        return
    token = _ANSWER.set(_Answer())
    try:
        yield
    except Exception as error:  # a bug; Python prints the traceback
        note_failure(f"{type(error).__name__}: {error}", 1)
        raise
    finally:
        finish_answer()
        _ANSWER.reset(token)


def answer(results: Mapping[str, Any]) -> None:
    """Write the results of a command as one JSON object, if it is to give one."""
    if current := _ANSWER.get():
        current.write(results)


def note_failure(error: object, code: int) -> None:
    """Keep what is wrong for the JSON object of the command, if it is to give one."""
    if current := _ANSWER.get():
        problems = {"problems": list(error.problems)} if isinstance(error, ConfigError) else {}
        current.failures.append({"message": str(error), "exit_code": code, **problems})


def finish_answer() -> None:
    """Write the JSON object of a command that failed, unless there is one; before a hard exit."""
    current = _ANSWER.get()
    if current and current.failures and not current.is_written:
        current.write({})
