"""Name the parameters of a network, and match patterns with the names.

A parameter has two names: by the layer's index, as "3.linear.kernel", and by the layer's kind, as
"Block.linear.kernel". A pattern matches a name, or all of it up to a dot:

    pattern           matches
    3.linear.kernel   one parameter
    3                 all parameters of layer 3
    Block.linear      all parameters of `linear` in every Block
    *.bias            the bias of every part of every layer; a star matches dots too
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.utils.text import did_you_mean

_MOST_SHOWN = 6  # names in a message


def names(i: int, layer: Layer, path: str) -> tuple[str, ...]:
    """Return the names of a parameter of layer `i`, whose path in the layer is `path`.

    >>> from gpipe_jax import zoo
    >>> names(2, zoo.mlp((4, 8, 2))[1], "linear.kernel")
    ('2.linear.kernel', 'Dense.linear.kernel')
    """
    return tuple(f"{owner}.{path}" for owner in (i, _kind(layer)))


def matches(patterns: Iterable[str], names: Sequence[str]) -> bool:
    """Return whether any pattern matches any of a parameter's names.

    >>> matches(["Dense.*.bias", "0"], ("2.linear.bias", "Dense.linear.bias"))
    True
    """
    return any(_matches(pattern, name) for pattern in patterns for name in names)


def check_used(argument: str, patterns: Any, names: Iterable[Sequence[str]]) -> None:
    """Raise ArgumentError unless `patterns` is a list of texts, each of which matches a parameter.

    Args:
        argument: The name of the argument that has the patterns.
        patterns: The value of the argument.
        names: The names of every parameter of the network.
    """
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ArgumentError(
            argument,
            f"`{argument}` must be a list of patterns, got {patterns!r}; put the pattern into a "
            f'list, as ["0.*"]',
        )
    names = list(names)
    unknown = [
        p
        for p in patterns
        if not isinstance(p, str) or not any(matches([p], names_of) for names_of in names)
    ]
    if unknown:
        raise ArgumentError(argument, _unknown(argument, unknown, names))


def _unknown(argument: str, unknown: list, names: list[Sequence[str]]) -> str:
    """Word that patterns match no parameter, with the parameters that they could have meant."""
    known = list(dict.fromkeys(name for names_of in names for name in names_of))
    texts = [f"{p!r}{did_you_mean(p, [*known, *_owners(known)])}" for p in unknown]
    shown = ", ".join(known[:_MOST_SHOWN]) + (", ..." if len(known) > _MOST_SHOWN else "")
    return (
        f"`{argument}` has patterns that match no parameter: {', '.join(texts)} "
        f"(parameters are named {shown})"
    )


def _owners(known: Iterable[str]) -> set[str]:
    """Return what is before the dots of names: layers and their parts."""
    parts = [name.split(".") for name in known]
    return {".".join(words[:n]) for words in parts for n in range(1, len(words))}


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _kind(layer: Layer) -> str:
    """Return the name of a layer's module or function, as "Block" for "Block(width=4)"."""
    return str(layer).partition("(")[0].partition(" ")[0]
