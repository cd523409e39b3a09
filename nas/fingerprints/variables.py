"""Find what a function reads from outside: of its closure, its module and other modules."""

from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from nas.fingerprints import members, names
from nas.fingerprints.names import Changed


def read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function reads from outside, with its name; of modules only the user's."""
    yield from closure(function)
    code, seen = function.__code__, set()
    attributes = names.attribute_names(code)
    for key in sorted(names.global_names(code) & function.__globals__.keys()):
        yield from _within_modules(key, function.__globals__[key], attributes, seen)


def closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of outer functions that a function reads."""
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            if key != "__class__":
                yield key, cell.cell_contents


def _within_modules(
    name: str, value: Any, attributes: set[str], seen: set[ModuleType]
) -> Iterator[tuple[str, Any]]:
    """Yield a value; of a module of the user's, in its place, the attributes of these names."""
    if not isinstance(value, ModuleType):
        yield name, value
    elif value not in seen and members.is_own(value.__name__, getattr(value, "__file__", None)):
        seen.add(value)
        for key in sorted(attributes & vars(value).keys()):
            yield from _within_modules(f"{name}.{key}", vars(value)[key], attributes, seen)


def parts(name: str, value: Any, attributes: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield a value; of a namespace, as of a command's arguments, in its place these attributes."""
    if type(value).__name__ not in ("Namespace", "SimpleNamespace"):
        yield name, value
        return
    for key in sorted(attributes & vars(value).keys()):
        yield f"{name}.{key}", vars(value)[key]


class Use(NamedTuple):
    """Hold what a function does with values from outside."""

    function: FunctionType
    changed: Changed
    attributes: set[str]  # names that it reads
    helpers: list[FunctionType]  # functions of the user's that it reads


def use(function: FunctionType) -> Use:
    """Return what a function does with values from outside."""
    helpers = [
        value
        for _, value in read_by(function)
        if isinstance(value, FunctionType) and members.is_own_object(value)
    ]
    attributes = names.attribute_names(function.__code__)
    return Use(function, names.changed_names(function), attributes, helpers)


def is_beside(value: Any, function: FunctionType) -> bool:
    """Return whether a value is a function of the same module, so that names mean the same."""
    return isinstance(value, FunctionType) and value.__globals__ is function.__globals__
