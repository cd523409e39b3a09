"""Names of the leaves of trees, as "linear.kernel"."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

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


def has_structure_of(params: PyTree) -> Callable[[PyTree], bool]:
    """Return a predicate: does a tree have the structure of `params`?"""
    structure = jax.tree.structure(params)

    def is_like(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    return is_like


def differentiable(a: Any) -> bool:
    """Whether an array (or shape) has a gradient: floating point or complex."""
    return jnp.issubdtype(a.dtype, jnp.inexact)


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure, shapes and types."""
    return signature(a) == signature(b)


def signature(tree: PyTree) -> tuple:
    """Structure, shapes and types of a tree, as a value to compare and to hash."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((a.shape, a.dtype) for a in leaves)


def describe(tree: PyTree) -> str:
    """The shapes of a tree in one line, as `float32[4,8]`."""
    named = jax.tree.map(lambda a: f"{a.dtype}[{','.join(map(str, a.shape))}]", tree)
    return str(named).replace("'", "")


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree (of arrays or shapes)."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def float_leaves(tree: PyTree) -> list:
    """The leaves that have gradients, in order."""
    return [a for a in jax.tree.leaves(tree) if differentiable(a)]


def with_floats(tree: PyTree, floats: list, rest: Callable[[Any], Any] = lambda a: a) -> PyTree:
    """`tree` with other floating-point leaves, and `rest` of those that are not."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(floats)
    return structure.unflatten([next(new) if differentiable(a) else rest(a) for a in leaves])


def wide(tree: PyTree) -> PyTree:
    """Parameters in the types in which their gradients are summed: float32 at least."""
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)


def vjp(function: Callable, params: PyTree, x: PyTree) -> tuple[PyTree, Callable, Any]:
    """Like `jax.vjp` of `function(params, x) -> (y, aux)`, for any leaves of x and y.

    Returns (y, pull, aux); `pull` takes the gradients of y's floating-point leaves, as a list, and
    returns those of the parameters and of x's floating-point leaves.
    """

    def of_floats(params: PyTree, floats: list) -> tuple[list, tuple]:
        y, aux = function(params, with_floats(x, floats))
        return float_leaves(y), (y, aux)

    _, pull, (y, aux) = jax.vjp(of_floats, params, float_leaves(x), has_aux=True)
    return y, pull, aux
