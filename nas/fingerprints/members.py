"""List what belongs to a class or an object of the user's, and tell that from installed code."""

import dataclasses
import functools
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from enum import Enum
from types import FunctionType
from typing import Any

from nas.fingerprints import names, plain
from nas.fingerprints.names import Changed

_PACKAGES = {"gpipe_jax", "nas"}
_OF_PACKAGES = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_SETUP = ("__init__", "__new__", "__post_init__", "__setstate__")


def is_own(module: str | None, file: str | None) -> bool:
    """Return whether code of this module and file is the user's, not of an installed package."""
    package, path = (module or "").partition(".")[0], file or ""
    if package in _PACKAGES or any(part in path for part in _OF_PACKAGES):
        return False
    # A file of the user's may have the name of a module of Python, such as test.py.
    is_file = os.path.isabs(path) and not path.startswith(_STANDARD_LIBRARY)
    return is_file or package not in sys.stdlib_module_names


def is_own_object(value: Any) -> bool:
    """Return whether a function or a class is the user's."""
    code = getattr(value, "__code__", None)
    module = sys.modules.get(value.__module__ or "")
    return is_own(value.__module__, code.co_filename if code else getattr(module, "__file__", None))


def installed_name(value: Any) -> str:
    """Return the name of an installed function or class, without the module that it is in today."""
    return f"{value.__module__.partition('.')[0]}.{value.__qualname__}"


def own_bases(kind: type) -> list[type]:
    """Return a class and its base classes, those that are the user's, the first base first."""
    return [base for base in reversed(kind.__mro__) if is_own_object(base)]


def members(kind: type) -> dict[str, Any]:
    """Return the functions and the values that a class itself defines, without generated ones."""
    if issubclass(kind, Enum):
        values = {each.name: each.value for each in kind}
        return values | {name: each for name, each in _functions(kind) if is_own_object(each)}
    found: dict[str, Any] = {
        name: each for name, each in _functions(kind) if not _is_generated(kind, name, each)
    }
    for each in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        for default in (each.default, each.default_factory):
            if default is not dataclasses.MISSING:
                found[each.name] = default
    for name, value in vars(kind).items():
        is_function = isinstance(value, FunctionType | staticmethod | classmethod | property)
        if not (is_function or name.startswith("__") or inspect.isdatadescriptor(value)):
            found.setdefault(name, value)
    return found


def _functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(kind).items():
        parts = {name: value}
        if isinstance(value, property):
            parts = {name: value.fget, f"{name}.setter": value.fset}
        for part, function in parts.items():
            function = getattr(function, "__func__", function)  # of a static or class method
            if isinstance(function, functools.cached_property):
                function = function.func
            if isinstance(function, FunctionType):
                yield part, function


def _is_generated(kind: type, name: str, function: FunctionType) -> bool:
    """Return whether Python or a package made a function, such as `__init__` of a dataclass."""
    makes = dataclasses.is_dataclass(kind) or issubclass(kind, tuple)
    is_text = function.__code__.co_filename == "<string>"
    return not is_own_object(function) or (makes and is_text and name.startswith(("__", "_")))


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that an object itself has."""
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    of_slots = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**of_slots, **getattr(value, "__dict__", {})}


def changed_by_methods(kind: type) -> Changed:
    """Return the attributes that methods change after the object is made."""
    methods = [
        value
        for base in own_bases(kind)
        for name, value in members(base).items()
        if isinstance(value, FunctionType) and name not in _SETUP
    ]
    return Changed().union(*map(names.changed_names, methods))


def listed(found: dict[str, Any]) -> str:
    """Return the names of functions and plain values, to notice one that is added."""
    counted = (
        name
        for name, value in found.items()
        if isinstance(value, FunctionType) or plain.text_of(value) is not None
    )
    return plain.text_of(sorted(counted)) or ""
