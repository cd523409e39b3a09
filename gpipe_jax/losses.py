"""Losses: (outputs, labels) -> losses of the examples, or (losses, metrics of the examples).

Every array returned has the examples as its first axis; further axes (positions) are averaged. The
pipeline sums them over micro-batches and replicas with the examples' weights, so that a loss is the
weighted mean over the whole batch, whatever the number of micro-batches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
    """Cross entropy in nats of integer labels [B, ...] under logits [B, ..., C], and accuracy."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return losses, {"accuracy": (logits.argmax(-1) == labels).astype(losses.dtype)}


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Squared error of every output; labels have the outputs' shape."""
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)} but outputs {list(outputs.shape)}; "
            f"make them alike, they are not broadcast"
        )
    return jnp.square(outputs - labels)


def weighted_sums(
    loss: Callable, outputs: PyTree, labels: PyTree, weights: jax.Array
) -> tuple[jax.Array, dict]:
    """Loss and metrics of one micro-batch: sums over its examples with `weights` [B]."""
    result = loss(outputs, labels)
    losses, metrics = result if isinstance(result, tuple) else (result, {})

    taken = {"loss", "step", "step_time_s"} & set(metrics)
    if taken:
        raise ValueError(f"the metrics of `loss` may not be called {', '.join(sorted(taken))}")

    def weigh(values: jax.Array) -> jax.Array:
        if values.ndim < 1 or values.shape[0] != weights.shape[0]:
            raise ValueError(
                f"`loss` must return one value for each example, an array [{weights.shape[0]}, ...]"
                f"; got shape {list(values.shape)}; do not average over the examples"
            )
        per_example = values.reshape(values.shape[0], -1).mean(axis=1)
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        return (per_example.astype(dtype) * weights.astype(dtype)).sum()

    return weigh(losses), {name: weigh(values) for name, values in metrics.items()}
