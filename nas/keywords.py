"""Refuse unknown keyword arguments of public functions, and suggest the ones that were meant."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from gpipe_jax.utils.text import did_you_mean_or_list

Kind = TypeVar("Kind", bound=type)
NOTHING: Mapping[str, str] = {}


def check_names(
    owner: str,
    given: Iterable[str],
    known: Collection[str],
    renamed: Mapping[str, str] = NOTHING,
) -> None:
    """Refuse names of keyword arguments that a function does not have.

    Args:
        owner: The function, for messages.
        given: Names that the caller has given.
        known: Names of its arguments.
        renamed: New names by names of earlier versions. Default: none.

    Raises:
        TypeError: A name is unknown, as Python itself reports it, but with a suggestion.

    Example:
        >>> check_names("nas.search", ["popluation"], ["population", "sample"])
        Traceback (most recent call last):
        TypeError: nas.search has no argument 'popluation'; did you mean 'population'?
    """
    problems = [
        f"{owner} has no argument {name!r}{_remedy(name, known, renamed)}"
        for name in given
        if name not in known
    ]
    if problems:
        raise TypeError("; ".join(problems))


def _remedy(name: str, known: Collection[str], renamed: Mapping[str, str]) -> str:
    if name in renamed:
        return f"; it is called {renamed[name]!r} since version 0.2, and the value stays"
    return did_you_mean_or_list(name, known)


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's arguments, or of a class's, without `**` ones."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def suggesting(renamed: Mapping[str, str] = NOTHING) -> Callable[[Kind], Kind]:
    """Let a class suggest an argument where its constructor gets an unknown one.

    Args:
        renamed: New names by names of earlier versions. Default: none.

    Returns:
        A decorator of a dataclass, of a NamedTuple, or of another class. A subclass that defines
        a constructor of its own is not changed.
    """

    def decorate(kind: Kind) -> Kind:
        constructor = "__new__" if issubclass(kind, tuple) else "__init__"
        make, known = getattr(kind, constructor), names_of(kind)

        @functools.wraps(make)
        def checked(this: Any, *values: Any, **named: Any) -> Any:
            if not named.keys() <= set(known):
                owner = this if isinstance(this, type) else type(this)
                check_names(f"nas.{owner.__name__}", named, known, renamed)
            return make(this, *values, **named)

        setattr(kind, constructor, checked)
        return kind

    return decorate
