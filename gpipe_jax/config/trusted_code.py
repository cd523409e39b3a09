"""Refuse to run the Python file that a run's config names, unless this user has run it before.

The folder of a run may come from someone else, and it names code: a Python file that makes the
data, or the functions of a search. A command that is given the folder runs this code only if the
same user has trained or searched with it on this machine before, or with `--trust`. Code is
identified by the hash of its content: the folder may be moved, and a changed file is refused again.
"""

import contextlib
from pathlib import Path

from gpipe_jax import known_code
from gpipe_jax.config.data import PythonConfig
from gpipe_jax.config.run import Config
from gpipe_jax.data import python_source
from gpipe_jax.errors import ArgumentError, ConfigError

TRUST = "run code that the folder names, even if you have not run it on this machine before"
"""Help text of the option `--trust`."""


def python_file(config: Config) -> bytes | None:
    """Return the Python file that makes a config's data; None if there is no such file."""
    file = _file(config)
    if file is not None:
        with contextlib.suppress(OSError):
            return file.read_bytes()
    return None


def check(config: Config, where: str) -> None:
    """Raise ConfigError if a run's config names a Python file that this user has not run here.

    Args:
        config: The config of the run.
        where: Its file, for the message.
    """
    code = python_file(config)
    if code is None or known_code.is_known(code):
        return
    problem = (
        f"data.source: this command would run {_file(config)}, which you have not run with `gpipe "
        f"train` on this machine; read the file, and add --trust if you trust it"
    )
    raise ConfigError([problem], where)


def _file(config: Config) -> Path | None:
    if isinstance(config.data, PythonConfig):
        with contextlib.suppress(ArgumentError):
            return python_source.split_source(config.data.source)[0]
    return None
