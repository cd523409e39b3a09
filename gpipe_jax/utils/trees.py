"""Name the leaves of trees (as "linear.kernel"), compare trees, and differentiate in them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

PyTree = Any


def path_name(path: tuple) -> str:
    """Return a leaf's path in a tree as one name."""
    keys = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
    return ".".join(map(str, keys))


def by_name(tree: PyTree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Return the leaves of a tree by name, in order; raise ValueError if two have the same name."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves of a tree are named {repeated!r}; use keys without dots")
    return named


def from_names(like: PyTree, values: dict[str, Any], is_leaf: Callable | None = None) -> PyTree:
    """Return a tree with the structure of `like` from its leaves by name."""
    return jax.tree.map_with_path(lambda path, _: values[path_name(path)], like, is_leaf=is_leaf)


def merge(tree: PyTree, rest: PyTree) -> PyTree:
    """Return a tree whose leaves are those of `tree`, and those of `rest` where it has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, tree, rest, is_leaf=_is_none)


def select(like: PyTree, tree: PyTree) -> PyTree:
    """Return `tree` with None where `like` has None: `merge` of two such parts is the whole."""
    return jax.tree.map(lambda a, b: None if a is None else b, like, tree, is_leaf=_is_none)


def _is_none(a: Any) -> bool:
    return a is None


def has_structure_of(params: PyTree) -> Callable[[PyTree], bool]:
    """Return a function that checks whether a tree has the structure of `params`."""
    structure = jax.tree.structure(params)

    def is_like(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    return is_like


def differentiable(a: Any) -> bool:
    """Return whether an array (or shape) has a gradient: it is floating point or complex."""
    return jnp.issubdtype(a.dtype, jnp.inexact)


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Return whether two trees have the same structure, shapes and types."""
    return signature(a) == signature(b)


def signature(tree: PyTree) -> tuple:
    """Return the structure, shapes and types of a tree as a hashable value."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((a.shape, a.dtype) for a in leaves)


def describe(tree: PyTree) -> str:
    """Write the shapes of a tree in one line, as `float32[4,8]`."""
    named = jax.tree.map(lambda a: f"{a.dtype}[{','.join(map(str, a.shape))}]", tree)
    return str(named).replace("'", "")


def tree_bytes(tree: PyTree) -> int:
    """Count the bytes of all arrays of a tree (of arrays or shapes)."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def float_leaves(tree: PyTree) -> list:
    """Return the leaves that have gradients, in order."""
    return [a for a in jax.tree.leaves(tree) if differentiable(a)]


def with_floats(tree: PyTree, floats: list, rest: Callable[[Any], Any] = lambda a: a) -> PyTree:
    """Replace the leaves that have gradients by `floats`, and apply `rest` to the others."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(floats)
    return structure.unflatten([next(new) if differentiable(a) else rest(a) for a in leaves])


def strong(tree: PyTree) -> PyTree:
    """Return a tree of arrays of strong types, from arrays and Python numbers.

    A number of Python, and what JAX computes from it, has a weak type: its type gives way to that
    of an array it meets. What is stored or sent has one type, so it must not be weak.
    """
    return jax.tree.map(_strong, tree)


def _strong(a: Any) -> jax.Array:
    array = a if isinstance(a, jax.Array) else jnp.asarray(a)
    is_weak = getattr(array, "weak_type", False)  # which arrays of random keys do not have
    return lax.convert_element_type(array, array.dtype) if is_weak else array


def first_without_type(tree: PyTree) -> tuple[str, Any] | None:
    """Return the path and the value of the first leaf that is neither an array nor a number."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        try:
            strong(leaf)
        except (TypeError, ValueError, OverflowError):
            return jax.tree_util.keystr(path), leaf
    return None


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Cast the arrays of a tree to the types of the arrays (or shapes) of `like`."""
    return jax.tree.map(lambda a, b: _cast(a, b.dtype), tree, like)


def cast_for_sums(tree: PyTree, like: PyTree) -> PyTree:
    """Cast arrays to the types in which those of `like` are summed: at least float32."""
    return jax.tree.map(lambda a, b: _cast(a, _wide_type(b)), tree, like)


def _cast(a: Any, dtype: Any) -> Any:
    """Return `a` in a type; most have it, and to ask JAX takes long for networks of many norms."""
    return a if getattr(a, "dtype", None) == dtype else jnp.asarray(a, dtype)


def wide(tree: PyTree) -> PyTree:
    """Cast parameters to the types in which their gradients are summed: at least float32."""
    return jax.tree.map(lambda a: a.astype(_wide_type(a)), tree)


def _wide_type(a: Any) -> Any:
    return jnp.promote_types(a.dtype, jnp.float32)


def vjp(function: Callable, params: PyTree, x: PyTree) -> tuple[PyTree, Callable, Any]:
    """Do as `jax.vjp` of `function(params, x) -> (y, aux)`, for any leaves of x and y.

    Returns (y, pull, aux). `pull` takes the gradients of y's floating-point leaves, as a list, and
    returns those of the parameters and of x's floating-point leaves.
    """

    def of_floats(params: PyTree, floats: list) -> tuple[list, tuple]:
        y, aux = function(params, with_floats(x, floats))
        return float_leaves(y), (y, aux)

    _, pull, (y, aux) = jax.vjp(of_floats, params, float_leaves(x), has_aux=True)
    return y, pull, aux
