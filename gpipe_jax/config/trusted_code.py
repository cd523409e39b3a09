"""Refuse to run the code that a run's config names, unless this user has run it before.

The folder of a run may come from someone else, and it names code: functions of Python files, or of
installed modules with arguments. A command that is given the folder runs this code only if the
same user has trained or searched with it on this machine before, or with `--trust`. A file is
identified by the hash of its content: the folder may be moved, and a changed file is refused again.
"""

import contextlib
import json
from pathlib import Path

from gpipe_jax import known_code, own_code
from gpipe_jax.config.base import NamedCode
from gpipe_jax.config.run import Config, calls
from gpipe_jax.errors import ArgumentError, ConfigError

TRUST = "run code that the folder names, even if you have not run it on this machine before"
"""Help text of the option `--trust`."""


def remember(config: Config) -> None:
    """Note that this user has run the code that a config names."""
    for code in calls(config):
        known_code.remember(_identity(config, code))


def check(config: Config, where: str) -> None:
    """Raise ConfigError if a run's config names code that this user has not run here.

    Args:
        config: The config of the run.
        where: Its file, for the message.
    """
    problems = []
    for code in calls(config):
        identity = _identity(config, code)
        if identity is None or known_code.is_known(identity):
            continue
        file = _file(config, code)
        advice = "read the file" if file else "read its code"
        problems.append(
            f"{code.field}: this command would run {file or code.reference}, which you have not "
            f"run with `gpipe train` on this machine; {advice}, and add --trust if you trust it"
        )
    if problems:
        raise ConfigError(problems, where)


def _identity(config: Config, code: NamedCode) -> bytes | None:
    """Return what identifies code: the content of a file and arguments, or the call of a module.

    Return None for a file that cannot be read: nothing of it can run.
    """
    arguments = json.dumps(code.arguments, sort_keys=True).encode() if code.arguments else b""
    file = _file(config, code)
    if file is not None:
        with contextlib.suppress(OSError):
            return file.read_bytes() + arguments
    is_file = own_code.split(code.reference)[0].endswith(".py")
    return None if is_file else code.reference.encode() + arguments


def _file(config: Config, code: NamedCode) -> Path | None:
    with contextlib.suppress(ArgumentError):
        return own_code.file_of(code.reference, config.train.code)
    return None
