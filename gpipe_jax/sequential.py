"""The plain program that a pipeline must equal: all layers in order, on one device.

Tests compare the pipeline with it leaf by leaf, benchmarks time both, and a reader can see here
what `Pipeline.value_and_grad` means.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.random_keys import apply_key, layer_key
from gpipe_jax.layers.shape_inference import as_replica, infer_shapes
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses import weighted_sums
from gpipe_jax.utils.trees import PyTree


def init(layers: Sequence[Layer], x: PyTree, seed: int = 0) -> tuple[list[PyTree], list[PyTree]]:
    """Parameters and running statistics of every layer, as in any pipeline of the same seed.

    Layer i is made from the key `layer_key(seed, i)`; a tied parameter is in its first layer, and
    None in the others.
    """
    params, shared = [], {}
    for i, shape in enumerate(infer_shapes(layers, x)):
        like = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape.input)
        fresh = shape.layer.init(layer_key(seed, i), like)
        own, _ = skips_and_ties.borrow(shape.layer, fresh, shared)
        shared = {**shared, **skips_and_ties.offered(shape.layer, own)}
        params.append(own)
    return params, [layer.init_statistics() for layer in layers]


def forward(
    layers: Sequence[Layer],
    params: Sequence[PyTree],
    stats: Sequence[PyTree],
    x: PyTree,
    key: jax.Array,
    micro_batch: int | jax.Array = 0,
    *,
    train: bool,
    progress: float | jax.Array = 1.0,
    examples: int | None = None,
) -> tuple[PyTree, list[PyTree]]:
    """The network's output for one micro-batch, and its moments (see `Layer.apply`).

    `examples` is the number of them if each has a random key of its own, else None.
    """
    boundary, shared, moments = Boundary(x, {}), {}, []
    for i, (layer, p, s) in enumerate(zip(layers, params, stats, strict=True)):
        shared = {**skips_and_ties.offered(layer, p), **shared}
        context = Context(apply_key(key, i, micro_batch, examples), train, progress)
        boundary, seen = skips_and_ties.call(layer, p, s, boundary, shared, context)
        moments.append(seen)
    return boundary.x, moments


def value_and_grad(
    layers: Sequence[Layer],
    loss: Callable,
    micro_batches: int = 1,
    *,
    replicas: int = 1,
    remat: bool = False,
    keys_per: str = "micro_batch",
) -> Callable:
    """(params, stats, batch, key, progress=1) -> ((loss, metrics), grads, stats): a pipelined step.

    The batch is cut into micro-batches of consecutive examples, each for one of the `replicas`, so
    there are `micro_batches` x `replicas` of them. Their losses are summed with the weights of the
    whole batch: the result is the weighted mean over the batch. The returned running statistics
    have seen all of it. With `remat` every micro-batch is recomputed in the backward pass.
    """

    def one(params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any) -> tuple:
        examples = batch["weights"].shape[0] if keys_per == "example" else None
        outputs, moments = forward(
            layers, params, stats, batch["inputs"], key, m,
            train=True, progress=progress, examples=examples,
        )  # fmt: skip
        return weighted_sums(loss, outputs, batch["labels"], batch["weights"]), moments

    body = _sum_over_replicas(jax.checkpoint(one) if remat else one, replicas)

    def total(params: PyTree, stats: PyTree, batch: dict, key: Any, progress: Any) -> tuple:
        weights = batch["weights"] / batch["weights"].sum()
        parts = jax.tree.map(
            lambda a: a.reshape(micro_batches, replicas, -1, *a.shape[1:]),
            {**batch, "weights": weights},
        )

        def add(sums: PyTree, part: tuple) -> tuple[PyTree, None]:
            m, micro_batch = part
            found = body(params, stats, micro_batch, key, m, progress)
            return jax.tree.map(jnp.add, sums, found), None

        first = jax.tree.map(lambda a: a[0], parts)
        shapes = jax.eval_shape(body, params, stats, first, key, 0, progress)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (loss_and_metrics, moments), _ = jax.lax.scan(add, zero, (jnp.arange(micro_batches), parts))
        return loss_and_metrics[0], (loss_and_metrics, moments)

    def run(params: PyTree, stats: PyTree, batch: dict, key: Any, progress: Any = 1.0) -> tuple:
        gradient = jax.value_and_grad(total, has_aux=True)
        (_, (result, moments)), grads = gradient(params, stats, batch, key, progress)
        mean = jax.tree.map(lambda a: a / (micro_batches * replicas), moments)
        stats = [a.commit(s, m) for a, s, m in zip(layers, stats, mean, strict=True)]
        return result, grads, stats

    return run


def _sum_over_replicas(one: Callable, replicas: int) -> Callable:
    """`one`, for micro-batch m of each replica, as arrays [D, B, ...]; the results are added up."""

    def alone(params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any) -> tuple:
        batch = jax.tree.map(lambda a: a[0], batch)
        return as_replica(one)(params, stats, batch, key, m, progress)

    def together(
        params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any
    ) -> Any:
        ids = m * replicas + jnp.arange(replicas)
        each = jax.vmap(one, in_axes=(None, None, 0, None, 0, None), axis_name=DATA)
        found = each(params, stats, batch, key, ids, progress)
        return jax.tree.map(lambda a: a.sum(0), found)

    return alone if replicas == 1 else together
