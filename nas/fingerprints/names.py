"""Find the names that a function reads from outside, and those that it changes."""

import ast
import dis
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

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
    """Hold names of variables and attributes that code changes."""

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
    """Return the variables and attributes that a function assigns or may change in place."""
    assigned = frozenset(_stored_names(function.__code__))
    node = source.syntax_tree(function)
    if node is None:
        return Changed(assigned, frozenset({ALL_CONTAINERS}))
    changed = (_last_name(target) for each in ast.walk(node) for target in _targets(each))
    return Changed(assigned, frozenset(name for name in changed if name is not None))


def _stored_names(code: CodeType) -> set[str]:
    own = set(code.co_cellvars)  # variables of this function are no state
    names = {each.argval for each in dis.get_instructions(code) if each.opname in _STORES} - own
    return names.union(*map(_stored_names, source.inner_codes(code)))


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what this node may change: `x` of `x[0] = 1`, `del x[0]` and `x.append(1)`."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        yield node.value
    method = node.func if isinstance(node, ast.Call) else None
    if isinstance(method, ast.Attribute) and method.attr not in _READ_ONLY:
        yield method.value


def _last_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
