"""Names of the leaves of trees, as "linear.kernel"."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def path_name(path: tuple) -> str:
    """A leaf's path in a tree as one name."""
    parts = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
    return ".".join(map(str, parts))


def by_name(tree: PyTree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """The leaves of a tree by name, in their order; ValueError if two have the same name."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves of a tree are named {twice!r}; use keys without dots")
    return named


def from_names(like: PyTree, values: dict[str, Any], is_leaf: Callable | None = None) -> PyTree:
    """The inverse of `by_name`, for a tree like `like`."""
    return jax.tree.map_with_path(lambda path, _: values[path_name(path)], like, is_leaf=is_leaf)
