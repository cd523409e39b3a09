"""What each layer of a network looks like, found without building anything."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.utils.trees import PyTree, describe, differentiable, signature


class LayerShape(NamedTuple):
    """What one layer of a network looks like: trees of `jax.ShapeDtypeStruct`."""

    layer: Layer
    boundary: Boundary  # what passes a cut in front of the layer
    input: PyTree  # what the layer is applied to: with what it pops
    params: PyTree  # its own: None in place of what it borrows from the owner of a tied name
    borrowed: dict[str, PyTree]  # tied name -> the parameter
    stats: PyTree  # running statistics
    output: PyTree  # of the layer: with what it stashes


def infer_shapes(layers: Sequence[Layer], x: PyTree) -> list[LayerShape]:
    """The shapes of every layer's parameters and output for an input like `x`; builds nothing.

    Raises ValueError, naming both layers, where an output does not fit the next layer's input, and
    where what is stashed, popped or tied does not match.
    """
    skips_and_ties.check_names(layers)
    shapes: list[LayerShape] = []
    known: dict = {}
    boundary, shared = Boundary(x, {}), {}
    for i, layer in enumerate(layers):
        taken, rest = skips_and_ties.take(layer, boundary)
        question = layer, signature(taken)
        if question not in known:
            known[question] = _infer_one(layers, i, taken)
        params, stats, output = known[question]
        skips_and_ties.check_tied(i, layer, params, shared)
        own, borrowed = skips_and_ties.borrow(layer, params, shared)
        shared = {**shared, **skips_and_ties.offered(layer, own)}
        shapes.append(LayerShape(layer, boundary, taken, own, borrowed, stats, output))
        boundary = skips_and_ties.give(layer, output, rest)
    return shapes


def as_replica(function: Callable) -> Callable:
    """`function` of one micro-batch as the only replica, so that it may name the replicas' axis."""
    return jax.vmap(function, in_axes=None, out_axes=None, axis_name=DATA, axis_size=1)


def _infer_one(layers: Sequence[Layer], i: int, x: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    layer, key = layers[i], jax.eval_shape(lambda: jax.random.key(0))

    def output(params: PyTree, stats: PyTree, key: jax.Array, train: bool) -> PyTree:
        y = lambda p, s, x, k: layer.apply(p, s, x, Context(k, train))[0]  # noqa: E731
        return jax.eval_shape(as_replica(y), params, stats, x, key)

    try:
        params, stats = layer.shapes(x)
        trained, evaluated = (output(params, stats, key, t) for t in (True, False))
    except Exception as error:
        source = f"the output of layer {i - 1}, {layers[i - 1]}" if i else "the network's inputs"
        raise ValueError(
            f"layer {i}, {layer}, does not take {source}: {describe(x)}; "
            f"make the two agree ({type(error).__name__}: {_first_line(error)})"
        ) from error
    _check_parameters(i, layer, params)
    if describe(trained) != describe(evaluated):
        raise ValueError(
            f"layer {i}, {layer}, gives {describe(trained)} in training but {describe(evaluated)} "
            f"in evaluation; make the two agree"
        )
    skips_and_ties.check_stashed(i, layer, trained)
    return params, stats, trained


def count_parameters(layers: Sequence[Layer], example: PyTree) -> int:
    """The number of parameters of a network for inputs like `example`; tied ones count once.

    `example` is a tree of arrays or `jax.ShapeDtypeStruct`s, the first axis being the examples; or
    a whole batch {"inputs": ..., "labels": ...}. Nothing is built.
    """
    if isinstance(example, dict) and {"inputs", "labels"} <= set(example):
        example = example["inputs"]
    return elements(infer_shapes(layers, example))


def elements(shapes: Iterable[LayerShape]) -> int:
    """The number of parameters of layers; tied ones count once."""
    return sum(a.size for shape in shapes for a in jax.tree.leaves(shape.params))


def _check_parameters(i: int, layer: Layer, params: PyTree) -> None:
    for path, a in jax.tree.leaves_with_path(params):
        if not differentiable(a):
            raise ValueError(
                f"layer {i}, {layer}, has the parameter {jax.tree_util.keystr(path)} of type "
                f"{a.dtype}, which cannot be trained; make it a constant of the layer instead"
            )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
