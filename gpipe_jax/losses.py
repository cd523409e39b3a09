"""Losses: (outputs, labels) -> losses of the examples, or (losses, metrics of the examples).

Every array returned has the examples as its first axis; further axes (positions) are averaged. The
pipeline sums them over micro-batches and replicas with the examples' weights, so that a loss is the
weighted mean over the whole batch, whatever the number of micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpipe_jax.utils.trees import PyTree


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
    """Cross entropy in nats of integer labels [B, ...] under logits [B, ..., C], and accuracy.

    A label that is no class, below 0 or from C on, has loss NaN; of weight 0 it counts nothing.
    """
    losses = _cross_entropy(logits, labels)
    return losses, {"accuracy": (logits.argmax(-1) == labels).astype(losses.dtype)}


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="fill")[..., 0]
    chosen = jnp.where(labels < 0, jnp.nan, chosen)  # an index below zero would count from the end
    wanted = (1 - smoothing) * chosen + smoothing * logits.mean(-1) if smoothing else chosen
    return jax.nn.logsumexp(logits, axis=-1) - wanted


def classification(*, label_smoothing: float = 0.0, auxiliary_weight: float = 0.0) -> Callable:
    """The loss of an image classifier: cross entropy, "accuracy", and "top5_accuracy" from C = 100.

    Label smoothing e gives every class e / C and the label 1 - e more (Szegedy et al., Rethinking
    the Inception Architecture, section 7). With an auxiliary weight the network's outputs are a
    pair, (logits, auxiliary logits), and the weighted loss of the latter, smoothed too, is added;
    the metrics are of the former. Equal arguments give equal loss functions.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: use a number in [0, 1)")
    if not auxiliary_weight >= 0:
        raise ValueError(f"auxiliary_weight is {auxiliary_weight}: use 0 (no such head) or more")
    return _Classification(label_smoothing, auxiliary_weight)


@dataclass(frozen=True)
class _Classification:
    label_smoothing: float
    auxiliary_weight: float

    def __call__(self, outputs: PyTree, labels: jax.Array) -> tuple[jax.Array, dict]:
        logits, *auxiliary = self._heads(outputs)
        losses = _cross_entropy(logits, labels, self.label_smoothing)
        metrics = {"accuracy": logits.argmax(-1) == labels}
        if logits.shape[-1] >= 100:
            best = jax.lax.top_k(logits, 5)[1]
            metrics["top5_accuracy"] = (best == labels[..., None]).any(-1)
        metrics = {name: hits.astype(losses.dtype) for name, hits in metrics.items()}
        for head in auxiliary:
            extra = _cross_entropy(head, labels, self.label_smoothing)
            losses = losses + self.auxiliary_weight * extra
        return losses, metrics

    def _heads(self, outputs: PyTree) -> tuple[jax.Array, ...]:
        """(logits,) or (logits, auxiliary logits)."""
        heads = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        wanted = 2 if self.auxiliary_weight else 1
        if len(heads) != wanted:
            what = "a pair (logits, auxiliary logits)" if wanted == 2 else "logits alone"
            raise ValueError(
                f"with auxiliary_weight {self.auxiliary_weight} the network must return {what}, "
                f"got {len(heads)} output{'s' * (len(heads) != 1)}; an auxiliary head and its "
                f"weight go together, use both or neither"
            )
        return heads


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
        weighted = per_example.astype(dtype) * weights.astype(dtype)
        return jnp.where(weights == 0, 0, weighted).sum()  # also if an example's value is NaN

    return weigh(losses), {name: weigh(values) for name, values in metrics.items()}
