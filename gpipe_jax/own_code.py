"""Find and call the functions that a config names: `model.py:layers`, or `package.module:name`.

A file is beside the config, or in the current folder. A module is such a file, or an installed one.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths
from gpipe_jax.utils.text import did_you_mean, did_you_mean_or_list

Folder = str | Path | None  # of the config; None is the current folder


def problem(reference: str) -> str | None:
    """Return why a text does not name a function; None if it does.

    >>> problem("model:layers")
    >>> problem("model.layers")
    'got model.layers, but a function is named by its module or file: module:function'
    """
    place, name = split(reference)
    if place and name.isidentifier():
        return None
    return f"got {reference}, but a function is named by its module or file: module:function"


def split(reference: str) -> tuple[str, str]:
    """Return the module (or file) and the name of a function such as "model.py:layers"."""
    place, _, name = reference.rpartition(":")
    return place, name


def file_of(reference: str, folder: Folder = None, setting: str = "function") -> Path | None:
    """Return the Python file that a reference names; None if there is none.

    Args:
        reference: The function, as "model.py:layers" or "model:layers".
        folder: Where to look before the current folder. Default: nowhere.
        setting: The setting with the reference, for messages.
    """
    place, _ = split(reference)
    name = place if place.endswith(".py") else f"{place.replace('.', '/')}.py"
    path = paths.local(setting, name)
    candidates = [Path(base) / path for base in (folder, "") if base is not None]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def find(reference: str, folder: Folder = None, setting: str = "function") -> Any:
    """Return what a reference names; this runs its file, or imports its module.

    Args:
        reference: The function, as "model.py:layers" or "package.module:function".
        folder: Where to look for files before the current folder. Default: nowhere.
        setting: The setting with the reference, for messages.

    Returns:
        The function, or whatever has that name.

    Raises:
        ArgumentError: There is no such file, module or name; or the code raised an error.
    """
    place, name = split(reference)
    path = file_of(reference, folder, setting)
    if not name.isidentifier() or (path is None and place.endswith(".py")):
        raise ArgumentError(
            setting,
            f"`{setting}` {reference} is not a function of a Python file{_looked_in(folder)}; give "
            f"one as my_file.py:function",
        )
    with _errors_of(reference, setting):
        module = _installed(place) if path is None else _run(path.resolve(), path.read_bytes())
    if module is None:
        raise ArgumentError(
            setting,
            f"`{setting}` {reference}: there is no file {place.replace('.', '/')}.py"
            f"{_looked_in(folder)}, and no module {place!r} is installed; correct the name, or "
            f"move the file beside the config",
        )
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ArgumentError(
            setting,
            f"`{setting}` {reference}: {path or place} does not define {name!r}"
            f"{did_you_mean(name, public) or '; define it there'}",
        )
    return getattr(module, name)


def call(
    reference: str,
    arguments: Mapping[str, Any],
    folder: Folder = None,
    *,
    setting: str = "function",
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Call the function that a reference names.

    Args:
        reference: The function, as "model.py:layers" or "package.module:function".
        arguments: The user's arguments of the function, by name.
        folder: Where to look for files before the current folder. Default: nowhere.
        setting: The setting with the reference, for messages.
        given: Further arguments, which the program gives. Default: none.

    Returns:
        What the function returns.

    Raises:
        ArgumentError: There is no such function, an argument does not fit, or it raised an error.
    """
    function, given = find(reference, folder, setting), given or {}
    check_arguments(function, reference, arguments, setting=setting, given=given)
    with _errors_of(reference, setting):
        return function(**given, **arguments)


def check_arguments(
    function: Callable,
    reference: str,
    arguments: Mapping[str, Any],
    *,
    setting: str = "function",
    positional: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> None:
    """Raise ArgumentError unless a function takes these arguments.

    Args:
        function: The function, or a class.
        reference: Its name, for messages.
        arguments: The user's arguments, by name.
        setting: The setting with the reference, for messages.
        positional: What the program gives by position, in words.
        given: The arguments that the program gives by name.
    """
    given = given or {}
    if not callable(function):
        kind = type(function).__name__
        message = f"`{setting}` {reference} is a {kind}; name a function or a class"
        raise ArgumentError(setting, message)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions that are written in C
        return
    parameters = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in () if open_ended else [*given, *arguments]:
        if name in parameters:
            continue
        if name in given:
            message = f"`{setting}` {reference} does not take {name!r}, which it is called with"
            raise ArgumentError(setting, f"{message}; add this parameter")
        known = [other for other in [*parameters][len(positional) :] if other not in given]
        hint = did_you_mean_or_list(name, known) if known else "; it takes none"
        message = f"`arguments` has {name!r}, which {reference} does not take{hint}"
        raise ArgumentError("arguments", message)
    both = sorted(given.keys() & arguments.keys())
    if both:
        message = f"`arguments` has {both[0]!r}, which {reference} gets from another setting"
        raise ArgumentError("arguments", f"{message}; remove it")
    try:
        signature.bind_partial(*positional)
    except TypeError as error:
        message = f"`{setting}` {reference}{signature} is called with ({', '.join(positional)})"
        remedy = "define it with these parameters, or name a class whose objects have them"
        raise ArgumentError(setting, f"{message}; {remedy}") from error
    try:
        signature.bind(*positional, **given, **arguments)
    except TypeError as error:
        message = f"`arguments` do not fit {reference}{signature}: {error}; correct them"
        raise ArgumentError("arguments", message) from error


def _looked_in(folder: Folder) -> str:
    return f" in {folder}" if folder else ""


def _installed(name: str) -> ModuleType | None:
    """Return an installed module, or None if there is none of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


@functools.lru_cache(maxsize=64)  # by content: one file may have the model and the loss
def _run(path: Path, content: bytes) -> ModuleType:
    # The module gets a name that no import has: a user's random.py must not replace `random`.
    # It has no dots, which pickle would take for packages: its objects may go to other processes.
    stem, crc = re.sub(r"\W", "_", path.stem), zlib.crc32(bytes(path))
    spec = importlib.util.spec_from_file_location(f"gpipe_source_{stem}_{crc:x}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(content, str(path), "exec"), module.__dict__)
    return module


@contextmanager
def _errors_of(reference: str, setting: str) -> Iterator[None]:
    # The user's own code may raise anything, and may end the process: then nothing is trained.
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            setting,
            f"`{setting}` {reference} raised {type(error).__name__}: {error}; call it in Python to "
            f"see where",
        ) from error
