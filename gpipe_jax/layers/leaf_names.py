"""Name the parameters of a network, and choose by patterns which of them are trained.

A parameter has two names: by the layer's index, as "3.linear.kernel", and by the layer's kind, as
"Block.linear.kernel". If `from_module` made the layer, it also has that in the model, as
"blocks.2.linear.kernel". A pattern matches a name, or all of it up to a dot:

    pattern           matches
    3.linear.kernel   one parameter
    3                 all parameters of layer 3
    Block.linear      all parameters of `linear` in every Block
    *.bias            the bias of every part of every layer; a star matches dots too
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.utils.text import did_you_mean
from gpipe_jax.utils.trees import PyTree, by_name, path_name

_MOST_SHOWN = 6  # names in a message


def names(i: int, layer: Layer, path: str) -> tuple[str, ...]:
    """Return the names of a parameter of layer `i`, whose path in the layer is `path`.

    >>> from gpipe_jax import zoo
    >>> names(2, zoo.mlp((4, 8, 2))[1], "linear.kernel")
    ('2.linear.kernel', 'Dense.linear.kernel')
    """
    in_model = layer.name_in_model(path)
    return (f"{i}.{path}", f"{_kind(layer)}.{path}", *([in_model] if in_model else []))


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
    if isinstance(patterns, str) or not isinstance(patterns, Collection):
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


def freeze(
    shapes: Sequence[LayerShape], trainable: Any = None, frozen: Any = None
) -> list[LayerShape]:
    """Divide the parameters of each layer into trained and frozen ones.

    Args:
        shapes: The shapes of each layer, as `infer_shapes` returns them.
        trainable: Patterns of the parameters to train. Default: all of them.
        frozen: Patterns of the parameters not to train; give at most one of the two.

    Returns:
        The shapes, with frozen parameters in `fixed`.

    Raises:
        ArgumentError: A pattern matches nothing, no parameter is left to train, or a tied parameter
            is frozen in some of its layers only.
    """
    if trainable is None and frozen is None:
        return list(shapes)
    if trainable is not None and frozen is not None:
        raise ArgumentError(
            "frozen",
            f"give `trainable` or `frozen`, not both: got {trainable!r} and {frozen!r}; what one "
            f"does not match belongs to the other",
        )
    argument = "trainable" if frozen is None else "frozen"
    patterns: Any = trainable if frozen is None else frozen
    layers = [shape.layer for shape in shapes]
    own = [by_name(shape.params) for shape in shapes]
    paths = [(*own[i], *(path for path, _ in layer.ties)) for i, layer in enumerate(layers)]
    check_used(
        argument, patterns, [names(i, layers[i], p) for i in range(len(own)) for p in paths[i]]
    )

    def is_frozen(i: int, path: str) -> bool:
        return matches(patterns, names(i, layers[i], path)) == (argument == "frozen")

    if all(is_frozen(i, path) for i, leaves in enumerate(own) for path in leaves):
        raise ArgumentError(
            argument,
            f"`{argument}` is {patterns!r}, which leaves no parameter to train; match "
            f"{'fewer' if argument == 'frozen' else 'more'} parameters",
        )
    ties = _frozen_ties(argument, layers, is_frozen)
    return [_divided(i, shape, is_frozen, ties) for i, shape in enumerate(shapes)]


def _divided(
    i: int, shape: LayerShape, is_frozen: Callable[[int, str], bool], ties: frozenset[str]
) -> LayerShape:
    """Return the shapes of layer i with its frozen parameters in `fixed`."""

    def part(frozen: bool) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, a: a if is_frozen(i, path_name(path)) == frozen else None, shape.params
        )

    own_ties = ties & {name for _, name in shape.layer.ties}
    fixed = shape.fixed._replace(params=part(frozen=True))
    return shape._replace(params=part(frozen=False), fixed=fixed, frozen_ties=own_ties)


def _frozen_ties(
    argument: str, layers: Sequence[Layer], is_frozen: Callable[[int, str], bool]
) -> frozenset[str]:
    """Return the names of the tied parameters that are frozen, in all of their layers."""
    users: dict[str, list[tuple[int, str]]] = {}
    for i, layer in enumerate(layers):
        for path, name in layer.ties:
            users.setdefault(name, []).append((i, path))
    for name, of_name in users.items():
        frozen, trained = (
            [f"{i}.{path}" for i, path in of_name if is_frozen(i, path) == kind]
            for kind in (True, False)
        )
        if frozen and trained:
            raise ArgumentError(
                argument,
                f"`{argument}` freezes {', '.join(frozen)} but trains {', '.join(trained)}, which "
                f"are one parameter, tied as {name!r}; match all of them, or none",
            )
    return frozenset(name for name, of_name in users.items() if is_frozen(*of_name[0]))


def _unknown(argument: str, unknown: list, names: list[Sequence[str]]) -> str:
    """Word that patterns match no parameter, with the parameters that they could have meant."""
    known = list(dict.fromkeys(name for names_of in names for name in names_of))
    candidates = [*known, *_owners(known)]
    texts = [
        f"{p!r}{did_you_mean(p, candidates)}" if isinstance(p, str) else f"{p!r}, which is no text"
        for p in unknown
    ]
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
