"""Find the names that a function reads from outside, and those that it changes."""

import ast
import dis
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from nas.fingerprints import source

ALL_CONTAINERS = "*"
"""Name of everything that can be changed in place, where the source does not tell what is."""

_READ_ONLY = {"copy", "count", "get", "index", "items", "keys", "values"}  # of lists and dicts
_READS = ("LOAD_GLOBAL", "LOAD_NAME")
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF", "STORE_ATTR")


def global_names(code: CodeType) -> set[str]:
    """Return the global names that code reads, also in functions within it."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname in _READS}
    return names.union(*map(global_names, source.inner_codes(code)))


def attribute_names(code: CodeType) -> set[str]:
    """Return all names in code that may be attributes, also in functions within it."""
    return set(code.co_names).union(*map(attribute_names, source.inner_codes(code)))


class Changed(NamedTuple):
    """Hold what code changes: names of variables, and of attributes with a dot before them."""

    assigned: frozenset[str] = frozenset()
    in_place: frozenset[str] = frozenset()

    def union(self, *others: "Changed") -> "Changed":
        """Return the names of all."""
        every = (self, *others)
        return Changed(
            frozenset().union(*(each.assigned for each in every)),
            frozenset().union(*(each.in_place for each in every)),
        )

    def has(self, name: str, value: object) -> bool:
        """Return whether a value of this name is state, which differs from moment to moment."""
        if name in self.assigned:
            return True
        is_mutable = isinstance(value, list | dict | set)
        return is_mutable and not self.in_place.isdisjoint((name, ALL_CONTAINERS))


def changed_names(function: FunctionType) -> Changed:
    """Return the attributes and outer variables that a function assigns or changes in place."""
    assigned = frozenset(stored_names(function.__code__))
    node = source.syntax_tree(function)
    if node is None:
        return Changed(assigned, frozenset({ALL_CONTAINERS}))
    outer = {*global_names(function.__code__), *function.__code__.co_freevars, *defaults(function)}
    changed = (_last_name(target) for each in ast.walk(node) for target in _targets(each))
    return Changed(
        assigned, frozenset(name for name in changed if name[:1] == "." or name in outer)
    )


def defaults(function: FunctionType) -> dict[str, Any]:
    """Return the default values of a function by argument."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def stored_names(code: CodeType) -> set[str]:
    """Return the attributes and outer variables that code assigns, also in functions within it."""
    stores = [each for each in dis.get_instructions(code) if each.opname in _STORES]
    attributes = {f".{each.argval}" for each in stores if each.opname == "STORE_ATTR"}
    variables = {each.argval for each in stores if each.opname != "STORE_ATTR"}
    own = code.co_cellvars  # variables of this function itself are not state
    inner = map(stored_names, source.inner_codes(code))
    return attributes.union(variables.difference(own), *inner)


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what this node may change: `x` of `x[0] = 1`, `del x[0]` and `x.append(1)`."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        yield node.value
    method = node.func if isinstance(node, ast.Call) else None
    if isinstance(method, ast.Attribute) and method.attr not in _READ_ONLY:
        yield method.value


def _last_name(node: ast.AST) -> str:
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return f".{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
