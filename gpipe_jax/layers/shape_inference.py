"""Infer the shapes of each layer of a network, without building anything."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import TraceContextError

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.layers.layer import Context, Layer, check_layers
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.layers.sources import closures
from gpipe_jax.layers.sources.module_layer import ModuleLayer
from gpipe_jax.utils.text import did_you_mean
from gpipe_jax.utils.trees import (
    PyTree,
    describe,
    differentiable,
    first_without_type,
    merge,
    signature,
    strong,
)


class Fixed(NamedTuple):
    """Hold what a layer has that never changes, or the shapes of it."""

    params: PyTree  # its own frozen parameters, and None for all others
    constants: PyTree


class LayerShape(NamedTuple):
    """Hold the shapes of one layer of a network, as trees of `jax.ShapeDtypeStruct`.

    The own parameters are in `params` and in `fixed`, and `merge` joins the two. `leaf_names`
    divides them.
    """

    layer: Layer
    boundary: Boundary  # the boundary of a stage that starts with this layer
    input: PyTree  # the input of the layer, with the tensors that it pops
    params: PyTree  # its own trained parameters, and None for all others
    fixed: Fixed
    borrowed: dict[str, PyTree]  # tied name -> the parameter that another layer owns
    stats: PyTree  # running statistics
    output: PyTree  # the output of the layer, with the tensors that it stashes
    extras: dict[str, PyTree]  # those that the layer reads
    frozen_ties: frozenset[str] = frozenset()  # names of its tied parameters that are frozen

    @property
    def own_params(self) -> PyTree:
        """Return its own parameters, trained and frozen, and None for those of other layers."""
        return merge(self.params, self.fixed.params)


def infer_shapes(
    layers: Sequence[Layer], x: PyTree, extras: Mapping[str, PyTree] | None = None
) -> list[LayerShape]:
    """Return the shapes of each layer's parameters and output for an input like `x`.

    All types are strong: a number that a layer returns is an array of a type of its own.

    Raises ValueError if an output does not fit the next layer's input (the message names both
    layers), if a layer cannot be built, if `layers` holds anything but layers, or if stashed,
    popped, tied or read names do not match.
    """
    check_layers(layers)
    skips_and_ties.check_names(layers)
    given: dict[str, PyTree] = jax.eval_shape(strong, dict(extras or {}))
    check_extras(layers, given)
    shapes: list[LayerShape] = []
    known: dict = {}
    boundary, shared = Boundary(jax.eval_shape(strong, x), {}), {}
    for i, layer in enumerate(layers):
        layer_input, rest = skips_and_ties.take(layer, boundary)
        read = skips_and_ties.read(layer, given)
        key = layer, signature((layer_input, read))
        if key not in known:
            known[key] = _infer_layer(layers, i, layer_input, read)
        params, stats, constants, output = known[key]
        skips_and_ties.check_tied(i, layer, params, shared)
        own, borrowed = skips_and_ties.borrow(layer, params, shared)
        shared = {**shared, **skips_and_ties.offered(layer, own)}
        fixed = Fixed(jax.tree.map(lambda _: None, own), constants)
        shapes.append(
            LayerShape(layer, boundary, layer_input, own, fixed, borrowed, stats, output, read)
        )
        boundary = skips_and_ties.give(layer, output, rest)
    return shapes


def check_extras(layers: Sequence[Layer], extras: Mapping[str, PyTree]) -> None:
    """Check that layers read all extras, and no others; raise ValueError if they do not."""
    for i, layer in enumerate(layers):
        if unknown := [name for name in layer.reads if name not in extras]:
            raise ValueError(
                f"layer {i}, {layer}, reads {unknown[0]!r}, but the example has "
                f"{', '.join(map(repr, extras)) or 'no extras'}; put an array for each example "
                f"into example['extras'][{unknown[0]!r}]{did_you_mean(unknown[0], extras)}"
            )
    read = {name for layer in layers for name in layer.reads}
    if unread := [name for name in extras if name not in read]:
        raise ValueError(
            f"no layer reads example['extras'][{unread[0]!r}]; write `.read({unread[0]!r})` behind "
            f"the layers that do, or leave it out"
        )


def as_replica(function: Callable) -> Callable:
    """Return `function` run as the only replica, so that it can use the name of the data axis."""
    return jax.vmap(function, in_axes=None, out_axes=None, axis_name=DATA, axis_size=1)


def _infer_layer(
    layers: Sequence[Layer], i: int, x: PyTree, extras: dict[str, PyTree]
) -> tuple[PyTree, ...]:
    """Return the shapes of a layer's parameters, statistics, constants and output."""
    layer, key = layers[i], jax.eval_shape(lambda: jax.random.key(0))

    def output(train: bool) -> PyTree:
        def apply(
            params: PyTree, stats: PyTree, constants: PyTree, x: PyTree, extras: dict, key: Any
        ) -> PyTree:
            progress = jnp.asarray(1.0, float)  # typed, as in a step
            context = Context(key, train, progress, constants, extras)
            return _as_arrays(i, layer, layer.apply(params, stats, x, context)[0])

        trace = jax.make_jaxpr(as_replica(apply), return_shape=True)
        program, shapes = trace(params, stats, constants, x, extras, key)
        closures.check(i, layer, program)
        return shapes

    params, stats, constants = _shapes(layers, i, x, extras)
    _check_parameters(i, layer, params)
    try:
        trained, evaluated = (output(train) for train in (True, False))
    except _OutputError as error:
        raise ValueError(str(error)) from None
    except UnfitModuleError as error:
        raise ValueError(f"layer {i}, {error}") from error
    except ArgumentError:
        raise
    except TraceContextError as error:
        raise ValueError(
            f"layer {i}, {layer}, changes a module that it does not take ({_first_line(error)}); "
            f'name the module in a tuple with the function, as ("dropout", function)'
        ) from error
    except Exception as error:
        raise ValueError(_does_not_take(layers, i, x, extras, error)) from error
    if describe(trained) != describe(evaluated):
        raise ValueError(
            f"layer {i}, {layer}, returns {describe(trained)} in training but "
            f"{describe(evaluated)} in evaluation; make the two agree"
        )
    skips_and_ties.check_stashed(i, layer, trained)
    return params, stats, constants, trained


class _OutputError(ValueError):
    """Carry the message of a wrong output out of the tracing of a layer."""


def _as_arrays(i: int, layer: Layer, output: PyTree) -> PyTree:
    """Return the output of a layer in arrays of strong types; numbers become arrays."""
    if found := first_without_type(output):
        path, leaf = found
        raise _OutputError(
            f"layer {i}, {layer}, returns {leaf!r} of type {type(leaf).__name__} at output{path}; "
            f"between layers there are only arrays and small numbers, so give it to the "
            f"layers as an argument"
        )
    return strong(output)


def _shapes(
    layers: Sequence[Layer], i: int, x: PyTree, extras: dict[str, PyTree]
) -> tuple[PyTree, PyTree, PyTree]:
    """Return the shapes of a layer's parameters, statistics and constants, in strong types."""
    layer = layers[i]
    try:
        params, stats = jax.eval_shape(strong, layer.shapes(x, **extras))
        return params, stats, jax.eval_shape(lambda: strong(layer.init_constants()))
    except UnfitModuleError as error:
        raise ValueError(f"layer {i}, {error}") from error
    except Exception as error:
        if isinstance(layer, ModuleLayer):
            raise ValueError(
                f"layer {i}, {layer}, cannot be built; correct its arguments, or the constructor "
                f"of {layer.module.__name__} ({type(error).__name__}: {_first_line(error)})"
            ) from error
        raise ValueError(_does_not_take(layers, i, x, extras, error)) from error


def _does_not_take(
    layers: Sequence[Layer], i: int, x: PyTree, extras: dict[str, PyTree], error: Exception
) -> str:
    source = f"the output of layer {i - 1}, {layers[i - 1]}" if i else "the network's inputs"
    with_extras = f", with the extras {describe(extras)}" if extras else ""
    return (
        f"layer {i}, {layers[i]}, does not take {source}: {describe(x)}{with_extras}; "
        f"make the two agree ({type(error).__name__}: {_first_line(error)})"
    )


def count_parameters(layers: Sequence[Layer], example: PyTree) -> int:
    """Count the parameters of a network; a tied parameter counts once. Nothing is built.

    Args:
        layers: The network.
        example: Inputs, as a tree of arrays or `jax.ShapeDtypeStruct`s whose first axis is the
            examples; or a batch {"inputs": ..., "labels": ...}.

    Returns:
        The number of parameters.

    Raises:
        ValueError: A layer does not fit its input.

    Example:
        >>> import numpy as np
        >>> import gpipe_jax as gpipe
        >>> count_parameters(gpipe.zoo.mlp((4, 8, 2)), np.zeros((1, 4), np.float32))
        58
    """
    extras = None
    if isinstance(example, dict) and {"inputs", "labels"} <= set(example):
        example, extras = example["inputs"], example.get("extras")
    return elements(infer_shapes(layers, example, extras))


def elements(shapes: Iterable[LayerShape]) -> int:
    """Count the parameters of layers; a tied parameter counts once."""
    return sum(a.size for shape in shapes for a in jax.tree.leaves(shape.own_params))


def _check_parameters(i: int, layer: Layer, params: PyTree) -> None:
    for path, a in jax.tree.leaves_with_path(params):
        if not differentiable(a):
            raise ValueError(
                f"layer {i}, {layer}, has the parameter {jax.tree_util.keystr(path)} of type "
                f"{a.dtype}, which cannot be trained; make it a constant of the layer instead"
            )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
