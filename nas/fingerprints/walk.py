"""Visit what a function or an object depends on: digest its code, write its values as texts."""

import dataclasses
import functools
import inspect
import os
from contextlib import suppress
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

from nas.fingerprints import members, names, plain, source, variables
from nas.fingerprints.names import Changed
from nas.fingerprints.source import Digests
from nas.fingerprints.variables import Use

MAX_PARTS = 2000  # functions and values; the rest is left out
NOTHING = Changed()


class Walk:
    """Visit each thing once.

    Attributes:
        codes: The digests of each function of the user's, by name.
        values: The text of each plain value, and the type of any other, by name.
    """

    def __init__(self) -> None:
        self.codes: dict[str, Digests] = {}
        self.values: dict[str, str] = {}
        self._seen: dict[int, tuple[str, Any]] = {}  # the objects too, so that no id is used again
        self._uses: dict[int, Use] = {}  # by function
        self._by_methods: dict[type, Changed] = {}

    def visit(self, name: str, value: Any, changed: Changed = NOTHING) -> None:
        """Add a value; `changed` is what the code that uses it changes."""
        if len(self.codes) + len(self.values) >= MAX_PARTS:
            return
        with suppress(Exception):  # attributes of an object may raise anything
            text = plain.text_of(value)
            if text is not None:
                if not plain.is_machine_path(value):
                    self.values[name] = text
            elif id(value) in self._seen:
                self.values[name] = self._seen[id(value)][0]
            elif not isinstance(value, os.PathLike | set | frozenset):
                self._seen[id(value)] = name, value
                self.values[name] = type(value).__name__
                self._visit_parts(name, value, changed)

    def _visit_unless_changed(self, name: str, part: str, value: Any, changed: Changed) -> None:
        """Visit `part` of what has this name: a variable, or an attribute after a dot."""
        is_value = plain.is_atom(value) or isinstance(value, plain.CONTAINERS)
        _, dot, attribute = part.rpartition(".")
        if not (is_value and changed.has(dot + attribute, value)):
            self.visit(f"{name}.{part.lstrip('.')}", value, changed)

    def _visit_parts(self, name: str, value: Any, changed: Changed) -> None:
        if isinstance(value, MappingProxyType | dict):
            for key, each in value.items():
                self.visit(f"{name}[{key!r}]", each)
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                self.visit(f"{name}[{index}]", each)
        else:
            self._visit_object(name, value, changed)

    def _visit_object(self, name: str, value: Any, changed: Changed) -> None:
        wrapped = getattr(value, "__wrapped__", None)  # as of jax.jit
        if isinstance(value, FunctionType):
            self._visit_function(name, value, changed)
        elif isinstance(value, type):
            self._visit_class(name, value)
        elif isinstance(value, MethodType):
            self.visit(f"{name}.self", value.__self__)
            self.visit(name, value.__func__)
        elif isinstance(value, functools.partial):
            self.visit(f"{name}.func", value.func)
            self.visit(f"{name}.arguments", {**dict(enumerate(value.args)), **value.keywords})
        elif isinstance(wrapped, FunctionType):
            self.visit(name, wrapped)
        elif inspect.isbuiltin(value):
            self.values[name] = value.__qualname__
            if not isinstance(value.__self__, ModuleType | type(None)):
                self.visit(f"{name}.self", value.__self__)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            self.values[name] = f"{value.dtype} of shape {tuple(value.shape)}"
        elif not isinstance(value, ModuleType):
            self._visit_instance(name, value, changed)

    # --- functions --------------------------------------------------------------------------------

    def _visit_function(self, name: str, function: FunctionType, changed: Changed) -> None:
        if not members.is_own_object(function):
            self.values[name] = members.installed_name(function)
            assigned = names.stored_names(function.__code__)
            changed = Changed(frozenset(assigned), frozenset({names.ALL_CONTAINERS}))  # as caches
            for key, value in variables.closure(function):
                self._visit_unless_changed(name, key, value, changed)
            return
        self.codes[name] = source.digests(function)
        uses = self._with_helpers(function)
        beside = [each for each in uses if variables.is_beside(each.function, function)]
        changed = changed.union(*(each.changed for each in beside))
        attributes = set[str]().union(*(each.attributes for each in uses))
        for key, value in names.defaults(function).items():
            self._visit_unless_changed(name, key, value, changed)
        for key, value in variables.read_by(function):
            if isinstance(value, FunctionType | type) and members.is_own_object(value):
                is_beside = variables.is_beside(value, function)
                self._visit_named(f"{name}.{key}", value, changed if is_beside else NOTHING)
            else:
                for part, each in variables.parts(key, value, attributes):
                    self._visit_unless_changed(name, part, each, changed)

    def _with_helpers(self, function: FunctionType) -> list[Use]:
        """Return the uses of a function, and of those of the user's that it and they read."""
        found: dict[int, Use] = {}
        left = [function]
        while left:
            each = left.pop()
            if id(each) not in found:
                use = self._uses.get(id(each)) or variables.use(each)
                self._uses[id(each)] = found[id(each)] = use
                left += use.helpers
        return list(found.values())

    def _visit_named(self, name: str, value: FunctionType | type, changed: Changed) -> None:
        """Visit a function or a class by the name of its definition, whoever reads it."""
        if id(value) not in self._seen:
            own = value.__qualname__.rpartition("<locals>.")[2]
            self.visit(name if own in self.values else own, value, changed)
        self.values[name] = self._seen.get(id(value), (name, None))[0]

    # --- objects ----------------------------------------------------------------------------------

    def _visit_instance(self, name: str, value: Any, changed: Changed) -> None:
        kind = type(value)
        is_own = members.is_own_object(kind)
        if is_own:
            if id(kind) not in self._seen:
                self._seen[id(kind)] = name, kind
                self._visit_class(name, kind)
            changed = changed.union(self._changed_by_methods(kind))
        elif not dataclasses.is_dataclass(kind):
            self.values[name] = members.installed_name(kind)
            return
        only_code = not is_own or _declares_identity(value)
        for key, each in sorted(members.attributes(value).items()):
            if not (only_code and (plain.is_atom(each) or isinstance(each, plain.CONTAINERS))):
                self._visit_unless_changed(name, f".{key}", each, changed)

    def _visit_class(self, name: str, kind: type) -> None:
        if not members.is_own_object(kind):
            self.values[name] = members.installed_name(kind)
            return
        changed = self._changed_by_methods(kind)
        for base in members.own_bases(kind):
            owner = name if base is kind else f"{name}.{base.__name__}"
            found = members.members(base)
            self.values[f"{owner}.members"] = members.listed(found)
            for key, member in sorted(found.items()):
                self._visit_unless_changed(owner, f".{key}", member, changed)

    def _changed_by_methods(self, kind: type) -> Changed:
        if kind not in self._by_methods:
            self._by_methods[kind] = members.changed_by_methods(kind)
        return self._by_methods[kind]


def _declares_identity(value: Any) -> bool:
    """Return whether an evaluator itself says which of its values count."""
    try:
        return bool(getattr(value, "identity", None) or getattr(value, "goes_by", None))
    except Exception:  # a property of the user's; whoever needs the identity reports it
        return False
