"""Resolve the paths that users write: `~`, environment variables, and addresses of buckets.

One rule for all of them: settings, options and arguments. A path is on this machine; where a run
may be in a bucket, a gs:// address is legal too.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpipe_jax.errors import ArgumentError

if TYPE_CHECKING:
    from etils import epath

AnyPath = str | os.PathLike[str]

# `pathlib` writes one slash: Path("gs://a") is "gs:/a".
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def path_problem(path: AnyPath, *, bucket: bool = False) -> str | None:
    """Return why a text cannot be used as a path; None if it can.

    Args:
        path: The path, as the user wrote it.
        bucket: Whether gs:// addresses are legal.

    >>> path_problem("https://a.b/c.yaml")
    'https:// addresses are not supported; give a path on this machine'
    >>> path_problem("gs://a/b", bucket=True)
    """
    if "\0" in os.fspath(path):
        return "a path cannot hold a zero byte; remove it"
    match = _ADDRESS.match(os.fspath(path))
    if match is None:
        return None
    scheme = match[1]
    if bucket and scheme == "gs":
        return None if os.fspath(path).startswith("gs://") else "write gs:// as text, not as a Path"
    other = " or a gs:// address" if bucket else ""
    return f"{scheme}:// addresses are not supported; give a path on this machine{other}"


def is_local(path: AnyPath) -> bool:
    """Return whether a path is on this machine, not an address."""
    return _ADDRESS.match(os.fspath(path)) is None


def local(argument: str, path: AnyPath) -> Path:
    """Return a path on this machine, with `~` and environment variables replaced.

    Args:
        argument: The name of the argument or setting, for messages.
        path: The path, as the user wrote it.

    Raises:
        ArgumentError: It is an address, or has a variable that is not set or an unknown user.
    """
    return Path(_expanded(argument, path, path_problem(path)))


def anywhere(argument: str, path: AnyPath) -> "epath.Path":
    """Return a path on this machine as `local` does, or a gs:// address.

    Raises:
        ArgumentError: It is another address, or has a variable that is not set or an unknown user.
    """
    from etils import epath

    return epath.Path(_expanded(argument, path, path_problem(path, bucket=True)))


def _expanded(argument: str, path: AnyPath, problem: str | None) -> str:
    text = os.fspath(path)
    if problem is not None:
        raise ArgumentError(argument, f"`{argument}` {text}: {problem}")
    for match in _VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ArgumentError(
                argument,
                f"`{argument}` {text}: the environment variable {name} is not set; set it, or "
                f"write the path out",
            )
    expanded = os.path.expanduser(
        _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    )
    if text.startswith("~") and expanded.startswith("~"):
        raise ArgumentError(
            argument,
            f"`{argument}` {text}: there is no user {text[1:].split('/')[0]}; for a name that "
            f"begins with ~ write ./{text}",
        )
    # A path object drops the "./", and the next function would take the name for a user.
    return os.path.abspath(expanded) if os.path.normpath(expanded)[0] == "~" else expanded
