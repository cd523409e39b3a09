"""Copy architectures before code of a user's sees them, so that it cannot change the search's own.

A space, an evaluator or a limit may change an architecture in place. Without copies this would give
fitnesses to other networks. Values that cannot change need no copy, and cost about a microsecond.
"""

import copy
import dataclasses
from enum import Enum
from typing import Any

from gpipe_jax.genotypes.genotype import Genotype

_ATOMS = frozenset({bool, bytes, complex, float, int, range, str, type(None), Genotype})
"""Types whose values cannot change. `Genotype` turns lists into tuples."""


def own(architecture: Any) -> Any:
    """Return a copy that shares nothing that can change; a value that cannot change is its own.

    Raises:
        TypeError: The architecture cannot be copied.
    """
    if is_immutable(architecture):
        return architecture
    try:
        return copy.deepcopy(architecture)
    except Exception as error:  # any object's own copying may raise anything
        kind = type(architecture).__name__
        raise TypeError(
            f"an architecture of type {kind} cannot be copied ({error}), but the search hands out "
            "copies only: make architectures of tuples, numbers and texts, or of a frozen "
            f"dataclass; or define {kind}.__deepcopy__"
        ) from error


def is_immutable(value: Any) -> bool:
    """Return whether no part of a value can be changed in place."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is tuple or kind is frozenset:
        return _ATOMS.issuperset(map(type, value)) or all(map(is_immutable, value))
    if isinstance(value, Enum):
        return True
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return all(is_immutable(getattr(value, each.name)) for each in dataclasses.fields(kind))
    return False
