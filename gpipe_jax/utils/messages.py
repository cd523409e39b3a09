"""Write texts of programs to standard output and error, and name their exit codes.

What is printed may come from a file, an exception or another machine. It is escaped here, and only
here, because a terminal obeys control characters.
"""

import os
import re
import sys
from typing import TextIO

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
    return code
