"""The plain program that a pipeline must equal: all layers in order, on one device.

Tests compare the pipeline with it leaf by leaf, benchmarks time both, and a reader can see here
what `Pipeline.value_and_grad` means.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.keys import apply_key, layer_key
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shapes import infer_shapes
from gpipe_jax.losses import weighted_sums

PyTree = Any


def init(layers: Sequence[Layer], x: PyTree, seed: int = 0) -> list[PyTree]:
    """Parameters of every layer: layer i from the key `layer_key(seed, i)`, as in any pipeline."""
    shapes = infer_shapes(layers, x)
    return [s.layer.init(layer_key(seed, i), s.input) for i, s in enumerate(shapes)]


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
