"""Define the plain program that a pipeline must equal: all layers in order, on one device.

It is the meaning of `Pipeline.value_and_grad`. Tests compare the pipeline with it leaf by leaf, and
benchmarks time both.

Public: `init`, `forward`, `value_and_grad`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.random_keys import apply_key, layer_key
from gpipe_jax.layers.shape_inference import as_replica, infer_shapes
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses.weighting import counting_rows, weighted_sums, with_counts
from gpipe_jax.utils.trees import PyTree, strong


def init(
    layers: Sequence[Layer],
    x: PyTree,
    seed: int = 0,
    *,
    extras: Mapping[str, PyTree] | None = None,
) -> tuple[list[PyTree], list[PyTree]]:
    """Make the parameters and running statistics of all layers.

    They equal those of any pipeline with the same seed. Layer i uses the key `layer_key(seed, i)`.

    Args:
        layers: The network.
        x: Inputs, as a tree of arrays or `jax.ShapeDtypeStruct`s whose first axis is the examples.
        seed: The seed of the parameters. Default: 0.
        extras: The extras that layers read, likewise. Default: none.

    Returns:
        Lists with one tree for each layer: parameters, and running statistics. A tied parameter is
        in its first layer, and None in the others.

    Raises:
        ValueError: A layer does not fit its input.

    Example:
        >>> import gpipe_jax as gpipe
        >>> params, stats = init(gpipe.zoo.mlp((4, 2)), jnp.zeros((1, 4)))
        >>> params[0]["linear"]["kernel"].shape
        (4, 2)
    """
    params, shared = [], {}
    for i, shape in enumerate(infer_shapes(layers, x, extras)):
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shape.input, shape.extras))
        like, read = zeros
        fresh = strong(shape.layer.init(layer_key(seed, i), like, **read))
        own, _ = skips_and_ties.borrow(shape.layer, fresh, shared)
        shared = {**shared, **skips_and_ties.offered(shape.layer, own)}
        params.append(own)
    return params, [strong(layer.init_statistics()) for layer in layers]


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
    extras: Mapping[str, PyTree] | None = None,
) -> tuple[PyTree, list[PyTree]]:
    """Compute the network's output for one micro-batch.

    Args:
        layers: The network.
        params: The parameters of each layer, as `init` makes them.
        stats: The running statistics of each layer.
        x: The inputs of the micro-batch.
        key: The random key of the step (`layers.random_keys.step_key`).
        micro_batch: The number of the micro-batch, for its random keys. Default: 0.
        train: Whether this is training.
        progress: The fraction of the training run that is done. Default: 1.
        examples: B if each example has random keys of its own. Default: keys of the micro-batch.
        extras: The extras of the micro-batch. Default: none.

    Returns:
        The output, and the moments of each layer (see `Layer.apply`).

    Example::

        params, stats = sequential.init(layers, x)
        y, _ = sequential.forward(layers, params, stats, x, jax.random.key(0), train=False)
    """
    boundary, shared, moments = Boundary(strong(x), {}), {}, []
    progress, given = jnp.asarray(progress, float), strong(dict(extras or {}))
    for i, (layer, p, s) in enumerate(zip(layers, params, stats, strict=True)):
        shared = {**skips_and_ties.offered(layer, p), **shared}
        own_key = apply_key(key, i, micro_batch, examples)
        context = Context(own_key, train, progress, extras=given)
        boundary, moments_of_layer = skips_and_ties.call(layer, p, s, boundary, shared, context)
        moments.append(moments_of_layer)
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
    """Return the function that `Pipeline.value_and_grad` computes.

    It splits a batch into micro-batches of consecutive examples, `micro_batches` x `replicas` of
    them. It sums their losses with the weights of the whole batch, so the loss is the weighted mean
    over the batch. An example of weight 0 takes the values of the first one of positive weight.
    With batch norm, which counts all examples, it keeps its inputs.

    Args:
        layers: The network.
        loss: A function (outputs, labels) -> losses, see `losses`.
        micro_batches: M. Default: 1.
        replicas: D, over which batch norm can average. Default: 1.
        remat: Whether the backward pass recomputes each micro-batch. Default: False.
        keys_per: The unit that gets its own random keys, "micro_batch" or "example". Default:
            "micro_batch".

    Returns:
        A function (params, stats, batch, key, progress=1) -> ((loss, metrics), grads, stats). The
        batch is {"inputs", "labels", "weights": [N]} and perhaps "extras"; `key` is the random key
        of the step; the returned running statistics are those after the step.

    Example::

        step = jax.jit(sequential.value_and_grad(layers, losses.softmax_cross_entropy, 4))
        (loss, metrics), grads, stats = step(params, stats, batch, step_key(0, 1))
    """

    def run_micro_batch(
        params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any
    ) -> tuple:
        examples = batch["weights"].shape[0] if keys_per == "example" else None
        outputs, moments = forward(
            layers, params, stats, batch["inputs"], key, m,
            train=True, progress=progress, examples=examples, extras=batch.get("extras"),
        )  # fmt: skip
        return weighted_sums(loss, outputs, batch["labels"], batch["weights"]), moments

    body = _sum_over_replicas(
        jax.checkpoint(run_micro_batch) if remat else run_micro_batch, replicas
    )

    def total(params: PyTree, stats: PyTree, batch: dict, key: Any, progress: Any) -> tuple:
        weights = batch["weights"] / batch["weights"].sum()
        batch = _with_counting_rows(batch, weights, batch_norm=bool(jax.tree.leaves(stats)))
        weights = with_counts(loss, batch["labels"], weights)
        micro_batched = jax.tree.map(
            lambda a: a.reshape(micro_batches, replicas, -1, *a.shape[1:]),
            {**batch, "weights": weights},
        )

        def add(sums: PyTree, row: tuple) -> tuple[PyTree, None]:
            m, micro_batch = row
            result = body(params, stats, micro_batch, key, m, progress)
            return jax.tree.map(jnp.add, sums, result), None

        first = jax.tree.map(lambda a: a[0], micro_batched)
        shapes = jax.eval_shape(body, params, stats, first, key, 0, progress)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        rows = (jnp.arange(micro_batches), micro_batched)
        (loss_and_metrics, moments), _ = jax.lax.scan(add, zero, rows)
        return loss_and_metrics[0], (loss_and_metrics, moments)

    def step(params: PyTree, stats: PyTree, batch: dict, key: Any, progress: Any = 1.0) -> tuple:
        gradient = jax.value_and_grad(total, has_aux=True)
        (_, (result, moments)), grads = gradient(params, stats, batch, key, progress)
        mean = jax.tree.map(lambda a: a / (micro_batches * replicas), moments)
        triples = zip(layers, stats, mean, strict=True)
        stats = [skips_and_ties.commit(*triple) for triple in triples]
        return result, grads, stats

    return step


def _with_counting_rows(batch: dict, weights: jax.Array, *, batch_norm: bool) -> dict:
    """Return the batch in which rows of weight 0 have other values; see `counting_rows`.

    With batch norm, which counts every row, they keep their inputs.
    """
    rows = counting_rows(weights)
    replaced = ("labels",) if batch_norm else ("inputs", "labels", "extras")
    replaced = [name for name in replaced if name in batch]
    taken = {name: jax.tree.map(lambda a: jnp.asarray(a)[rows], batch[name]) for name in replaced}
    return {**batch, **taken}


def _sum_over_replicas(function: Callable, replicas: int) -> Callable:
    """Run `function` on micro-batch m of each replica, in arrays [D, B, ...]; sum the results."""

    def alone(params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any) -> tuple:
        batch = jax.tree.map(lambda a: a[0], batch)
        return as_replica(function)(params, stats, batch, key, m, progress)

    def together(
        params: PyTree, stats: PyTree, batch: dict, key: Any, m: Any, progress: Any
    ) -> Any:
        ids = m * replicas + jnp.arange(replicas)
        each = jax.vmap(function, in_axes=(None, None, 0, None, 0, None), axis_name=DATA)
        results = each(params, stats, batch, key, ids, progress)
        return jax.tree.map(lambda a: a.sum(0), results)

    return alone if replicas == 1 else together
