"""Gradients of functions of trees that hold integers beside floating-point numbers; their types."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.layers.shape_inference import differentiable

PyTree = Any


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
