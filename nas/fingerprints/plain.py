"""Write plain values as short texts: numbers, texts, and containers of them."""

import hashlib
import os
from collections.abc import Iterable
from enum import Enum
from numbers import Number
from types import MappingProxyType
from typing import Any

ATOMS = (Number, bytes, range, slice, str, type(None), type(...))
CONTAINERS = (MappingProxyType, dict, frozenset, list, set, tuple)
_MAPPINGS = (MappingProxyType, dict)
MAX_TEXT = 60  # characters; a longer text ends with a digest
MAX_DEPTH = 20  # of containers within containers
MAX_VALUES = 100_000  # in a container; larger ones count by their length


def is_atom(value: Any) -> bool:
    """Return whether a value is a number, a text or the like."""
    return isinstance(value, ATOMS)


def is_machine_path(value: Any) -> bool:
    """Return whether a value is an absolute path, which says nothing on another machine."""
    return isinstance(value, str) and len(value) > 1 and os.path.isabs(value)


def text_of(value: Any) -> str | None:
    """Write a value that consists of plain values only; None for others."""
    if isinstance(value, Enum):
        return f"{value} = {text_of(value.value)}"
    if isinstance(value, CONTAINERS) and _count(value) > MAX_VALUES:
        return f"{type(value).__name__} of {len(value)}"
    text = _text(value)
    return None if text is None else _shortened(text)


def _count(value: Any, depth: int = 0) -> int:
    """Count the values in a container, up to somewhat more than `MAX_VALUES`."""
    if not isinstance(value, CONTAINERS):
        return 1
    if depth > MAX_DEPTH:  # as of a list that contains itself
        return MAX_VALUES + 1
    total = len(value)
    for each in value.values() if isinstance(value, _MAPPINGS) else value:
        if total > MAX_VALUES:
            break
        total += _count(each, depth + 1)
    return total


def _text(value: Any) -> str | None:
    if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
        data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        return f"{value[:20]!r}... ({_digest(data)})"
    if is_atom(value):
        if is_machine_path(value):
            return "a path"
        return str(value) if isinstance(value, Number) else repr(value)  # NumPy's like Python's
    if not isinstance(value, CONTAINERS):
        return None
    if isinstance(value, _MAPPINGS):
        keys, values = _texts(value), _texts(value.values())
        if keys is None or values is None:
            return None
        return "{" + ", ".join(map("{}: {}".format, keys, values)) + "}"
    texts = _texts(value)
    if texts is None:
        return None
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(texts)) + "}"
    return f"[{', '.join(texts)}]" if isinstance(value, list) else f"({', '.join(texts)})"


def _texts(values: Iterable[Any]) -> list[str] | None:
    texts: list[str] = []
    for value in values:
        text = _text(value)
        if text is None:
            return None
        texts.append(text)
    return texts


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:40]}... ({_digest(text.encode('utf-8', 'surrogatepass'))})"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
