"""Write messages of programs to standard error, and name their exit codes."""

import sys

BAD_INPUT = 2  # exit code: do not retry


def say(text: object, program: str = "gpipe") -> None:
    """Write one line to standard error."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def fail(error: object, code: int, program: str = "gpipe") -> int:
    """Write what is wrong to standard error; return the exit code."""
    say(error, program)
    return code
