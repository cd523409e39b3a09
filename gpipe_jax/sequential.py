"""The plain program that a pipeline must equal: all layers in order, on one device.

Tests compare the pipeline with it leaf by leaf, benchmarks time both, and a reader can see here
what `Pipeline.value_and_grad` means.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.layers.layer import Layer
from gpipe_jax.losses import weighted_sums

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
        leaves, structure = jax.tree.flatten(x)
        question = (layer, structure, tuple((a.shape, a.dtype) for a in leaves))
        if question not in known:
            known[question] = _infer_one(layers, i, x)
        shapes.append(LayerShape(layer, x, *known[question]))
        x = shapes[-1].output
    return shapes


def _infer_one(layers: Sequence[Layer], i: int, x: PyTree) -> tuple[PyTree, PyTree]:
    layer, key = layers[i], jax.eval_shape(lambda: jax.random.key(0))
    try:
        params = jax.eval_shape(layer.init, key, x)
        output = jax.eval_shape(lambda p, x, k: layer.apply(p, x, k, train=True), params, x, key)
    except Exception as error:
        source = f"the output of layer {i - 1}, {layers[i - 1]}" if i else "the network's inputs"
        raise ValueError(
            f"layer {i}, {layer}, does not take {source}: {describe(x)}; "
            f"make the two agree ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return params, output


def describe(tree: PyTree) -> str:
    """The shapes of a tree in one line, as `float32[4,8]`."""
    named = jax.tree.map(lambda a: f"{a.dtype}[{','.join(map(str, a.shape))}]", tree)
    return str(named).replace("'", "")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def init(layers: Sequence[Layer], x: PyTree, seed: int = 0) -> list[PyTree]:
    """Parameters of every layer: layer i from the key `layer_key(seed, i)`, as in any pipeline."""
    shapes = infer_shapes(layers, x)
    return [s.layer.init(layer_key(seed, i), s.input) for i, s in enumerate(shapes)]


def layer_key(seed: int | jax.Array, layer_id: int | jax.Array) -> jax.Array:
    """The key that a layer is initialised from; independent of how the network is cut."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), layer_id)


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The key of all randomness of one training step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def apply_key(
    step: jax.Array, layer_id: int | jax.Array, micro_batch: int | jax.Array
) -> jax.Array:
    """The key of one layer on one micro-batch, from `step_key`; never of a tick or a stage."""
    return jax.random.fold_in(jax.random.fold_in(step, layer_id), micro_batch)


def forward(
    layers: Sequence[Layer],
    params: Sequence[PyTree],
    x: PyTree,
    key: jax.Array,
    micro_batch: int | jax.Array = 0,
    *,
    train: bool,
) -> PyTree:
    """The network's output for one micro-batch."""
    for i, (layer, p) in enumerate(zip(layers, params, strict=True)):
        x = layer.apply(p, x, apply_key(key, i, micro_batch), train=train)
    return x


def value_and_grad(
    layers: Sequence[Layer], loss: Callable, micro_batches: int = 1, *, remat: bool = False
) -> Callable:
    """A function (params, batch, key) -> ((loss, metrics), grads), the meaning of a pipelined step.

    The batch is cut into micro-batches of consecutive examples, whose losses are summed with the
    weights of the whole batch, so that the result is the weighted mean over the batch. With `remat`
    every layer is recomputed in the backward pass.
    """

    def one(params: Sequence[PyTree], batch: dict, key: jax.Array, m: int | jax.Array) -> tuple:
        outputs = forward(layers, params, batch["inputs"], key, m, train=True)
        return weighted_sums(loss, outputs, batch["labels"], batch["weights"])

    def total(params: Sequence[PyTree], batch: dict, key: jax.Array) -> tuple:
        weights = batch["weights"] / batch["weights"].sum()
        parts = jax.tree.map(
            lambda a: a.reshape(micro_batches, -1, *a.shape[1:]), {**batch, "weights": weights}
        )
        body = jax.checkpoint(one) if remat else one

        def step(sums: PyTree, part: tuple) -> tuple[PyTree, None]:
            m, micro_batch = part
            return jax.tree.map(jnp.add, sums, body(params, micro_batch, key, m)), None

        first = jax.tree.map(lambda a: a[0], parts)
        zero = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, params, first, key, 0)
        )
        return jax.lax.scan(step, zero, (jnp.arange(micro_batches), parts))[0]

    return jax.value_and_grad(total, has_aux=True)
