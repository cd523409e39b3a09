"""What each layer of a network looks like, found without building anything."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.layers.layer import Layer

PyTree = Any


class LayerShape(NamedTuple):
    """What one layer of a network looks like: trees of `jax.ShapeDtypeStruct`."""

    layer: Layer
    input: PyTree
    params: PyTree
    output: PyTree


def infer_shapes(layers: Sequence[Layer], x: PyTree) -> list[LayerShape]:
    """The shapes of every layer's parameters and output for an input like `x`; builds nothing.

    Raises ValueError, naming both layers, where an output does not fit the next layer's input.
    """
    shapes: list[LayerShape] = []
    known: dict = {}
    for i, layer in enumerate(layers):
        question = layer, signature(x)
        if question not in known:
            known[question] = _infer_one(layers, i, x)
        shapes.append(LayerShape(layer, x, *known[question]))
        x = shapes[-1].output
    return shapes


def _infer_one(layers: Sequence[Layer], i: int, x: PyTree) -> tuple[PyTree, PyTree]:
    layer, key = layers[i], jax.eval_shape(lambda: jax.random.key(0))
    try:
        params = jax.eval_shape(layer.init, key, x)
        output, evaluated = (
            jax.eval_shape(lambda p, x, k, t=t: layer.apply(p, x, k, train=t), params, x, key)
            for t in (True, False)
        )
    except Exception as error:
        source = f"the output of layer {i - 1}, {layers[i - 1]}" if i else "the network's inputs"
        raise ValueError(
            f"layer {i}, {layer}, does not take {source}: {describe(x)}; "
            f"make the two agree ({type(error).__name__}: {_first_line(error)})"
        ) from error
    _check_parameters(i, layer, params)
    if describe(output) != describe(evaluated):
        raise ValueError(
            f"layer {i}, {layer}, gives {describe(output)} in training but {describe(evaluated)} "
            f"in evaluation; make the two agree"
        )
    return params, output


def _check_parameters(i: int, layer: Layer, params: PyTree) -> None:
    for path, a in jax.tree.leaves_with_path(params):
        if not differentiable(a):
            raise ValueError(
                f"layer {i}, {layer}, has the parameter {jax.tree_util.keystr(path)} of type "
                f"{a.dtype}, which cannot be trained; make it a constant of the layer instead"
            )


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


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
