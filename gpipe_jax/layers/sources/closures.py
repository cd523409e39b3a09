"""Refuse a layer that computes with parts of its model that it does not take."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.instance_layer import InstanceLayer
from gpipe_jax.layers.sources.linen_model import BoundLinenLayer
from gpipe_jax.layers.sources.nnx_layer import KINDS


def check(i: int, layer: Layer, program: ClosedJaxpr) -> None:
    """Raise ArgumentError if layer `i` closes over trained arrays of the model that it is from.

    Such arrays would be constants of the compiled program: they get no gradient.

    Args:
        i: The index of the layer.
        layer: The layer.
        program: The traced program of the layer.
    """
    origin = layer.origin if isinstance(layer, InstanceLayer | BoundLinenLayer) else None
    if origin is None:
        return
    closed_over = list(_closed_over(program))
    paths = [
        path
        for path, array in _trained(origin.model)
        if any(_is_same(array, other) for other in closed_over)
    ]
    if not paths:
        return
    model = type(origin.model).__name__
    names = ", ".join(".".join(map(str, path)) for path in paths)
    owners = dict.fromkeys(".".join(map(str, path[:-1])) for path in paths if path[1:])
    listed = ", ".join(f'"{owner}"' for owner in owners)
    remedy = (
        f"name the modules in a tuple with the function, as ({listed}, function), and use those "
        f"that it then takes"
        if owners
        else "let a module hold the parameter, and name that in a tuple with the function"
    )
    raise ArgumentError(
        "blocks",
        f"layer {i}, {layer}, computes with {names} of {model}, which its function does not take, "
        f"so a pipeline would not train them; {remedy}; copy an array that is meant as a constant",
    )


def _closed_over(program: Any) -> Iterator[Any]:
    """Yield the arrays in a traced program, and in those that it calls, that are no arguments."""
    if isinstance(program, ClosedJaxpr | Jaxpr):  # one class in newer versions of JAX
        yield from getattr(program, "consts", ())
        equations = getattr(program, "jaxpr", program).eqns
        for called in jax.tree.leaves([equation.params for equation in equations]):
            yield from _closed_over(called)


def _trained(model: Any) -> list[tuple[tuple, Any]]:
    """Return the arrays of a model that training changes, by path."""
    if isinstance(model, linen.Module):
        params = jax.tree.leaves_with_path(model.variables.get("params", {}))
        return [(tuple(key.key for key in path), array) for path, array in params]
    return [(path, v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model, KINDS))]


def _is_same(array: Any, other: Any) -> bool:
    """Return whether two arrays are one; a traced program has its own views of NumPy arrays."""
    if isinstance(array, np.ndarray) and not isinstance(other, jax.Array):
        return np.shares_memory(array, np.asarray(other))
    return array is other
