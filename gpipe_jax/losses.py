"""Define losses: (outputs, labels) -> losses of the examples, or (losses, metrics of the examples).

The first axis of each returned array is the examples; further axes (positions) are averaged. The
pipeline sums these arrays over micro-batches and replicas, with the weights of the examples. So a
loss is the weighted mean over the whole batch, whatever the number of micro-batches.

Public: `softmax_cross_entropy`, `classification`, `squared_error`, `weighted_sums`,
`counting_rows`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.checks import check_fraction
from gpipe_jax.utils.trees import PyTree


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
    """Compute the cross entropy of integer labels, and the accuracy.

    Args:
        logits: Scores [B, ..., C], in any floating-point type.
        labels: Integers [B, ...] in 0..C-1. Another label has the loss NaN, which does not count
            for an example of weight 0.

    Returns:
        The losses [B, ...] in nats, in float32 at least; and {"accuracy": [B, ...]}, 0 or 1 each.

    Example:
        >>> losses, metrics = softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        >>> float(losses[0])  # log(4)
        1.3862943649291992
    """
    losses = _cross_entropy(logits, labels)
    return losses, {"accuracy": (logits.argmax(-1) == labels).astype(losses.dtype)}


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="fill")[..., 0]
    chosen = jnp.where(labels < 0, jnp.nan, chosen)  # an index below zero would count from the end
    expected = (1 - smoothing) * chosen + smoothing * logits.mean(-1) if smoothing else chosen
    return jax.nn.logsumexp(logits, axis=-1) - expected


def classification(*, label_smoothing: float = 0.0, auxiliary_weight: float = 0.0) -> Callable:
    """Return the loss of an image classifier.

    Source: Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567,
    section 7 (label smoothing).

    Args:
        label_smoothing: e in [0, 1). The target is e / C for each class, and 1 - e more for the
            label. Default: 0.
        auxiliary_weight: The weight of an auxiliary head's loss, which is smoothed too. If it is
            not 0, the network returns a pair (logits, auxiliary logits). Default: 0.

    Returns:
        A function (outputs, labels) -> (losses [B, ...], metrics). The metrics are "accuracy", and
        "top5_accuracy" if there are at least 100 classes, of the first logits only. Equal arguments
        give equal functions.

    Raises:
        ValueError: An argument is out of range; or, in a call, the number of outputs is wrong.

    Example:
        >>> classification(label_smoothing=0.1) == classification(label_smoothing=0.1)
        True
    """
    check_fraction("label_smoothing", label_smoothing)
    if not auxiliary_weight >= 0:
        raise ArgumentError(
            "auxiliary_weight",
            f"`auxiliary_weight` is {auxiliary_weight}; use 0 (no such head) or more",
        )
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
        """Return (logits,) or (logits, auxiliary logits)."""
        heads = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        count = 2 if self.auxiliary_weight else 1
        if len(heads) != count:
            expected = "a pair (logits, auxiliary logits)" if count == 2 else "logits alone"
            got = "1 output" if len(heads) == 1 else f"{len(heads)} outputs"
            raise ValueError(
                f"with `auxiliary_weight` {self.auxiliary_weight} the network must return "
                f"{expected}, got {got}; use both an auxiliary head and its weight, or neither"
            )
        return heads


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the squared error of each output.

    Args:
        outputs: Floating-point numbers [B, ...].
        labels: Numbers of the same shape.

    Returns:
        The squared differences [B, ...].

    Raises:
        ValueError: The shapes differ; they are not broadcast.

    Example:
        >>> squared_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).tolist()
        [0.0, 4.0]
    """
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, but outputs {list(outputs.shape)}; "
            f"make the shapes equal, as they are not broadcast"
        )
    return jnp.square(outputs - labels)


def counting_rows(weights: Any) -> Any:
    """Return the row of a batch whose values each row takes before it is computed with.

    A row of weight 0 does not count. It takes the values of the first row of positive weight: its
    own may be NaN, or make the slope of its loss infinite, and 0 times that is NaN.

    Args:
        weights: The weight of each example, [N], at least one of them positive; of numpy or traced.

    Returns:
        The number of a row for each row, [N].

    Example:
        >>> counting_rows(np.array([0.0, 0.5, 0.0, 0.5])).tolist()
        [1, 1, 1, 3]
    """
    xp = np if isinstance(weights, np.ndarray) else jnp
    return xp.where(weights == 0, (weights > 0).argmax(), xp.arange(len(weights)))


def weighted_sums(
    loss: Callable, outputs: PyTree, labels: PyTree, weights: jax.Array
) -> tuple[jax.Array, dict]:
    """Sum the losses and metrics of one micro-batch over its examples.

    Args:
        loss: A function (outputs, labels) -> losses [B, ...] or (losses, {name: metric [B, ...]}).
            A metric may also be a Python number.
        outputs: The network's outputs for the micro-batch.
        labels: The labels of the micro-batch.
        weights: The weight of each example, [B]. An example of weight 0 does not count, even if its
            loss is NaN.

    Returns:
        The weighted sum of the losses, and of each metric; scalars, in float32 at least.

    Raises:
        ValueError: The loss returns no real array [B, ...], or a metric has a reserved name.

    Example:
        >>> outputs, labels = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
        >>> float(weighted_sums(squared_error, outputs, labels, jnp.array([0.5, 0.5]))[0])
        2.0
    """
    losses, metrics = _losses_and_metrics(loss(outputs, labels))

    def weigh(name: str, values: Any) -> jax.Array:
        values = _of_examples(name, values, weights.shape[0])
        per_example = values.reshape(values.shape[0], -1).mean(axis=1)
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weighted = per_example.astype(dtype) * weights.astype(dtype)
        return jnp.where(weights == 0, 0, weighted).sum()  # also if an example's value is NaN

    sums = {name: weigh(f"metric {name!r}", _spread(a, weights)) for name, a in metrics.items()}
    return weigh("the losses", losses), sums


_RETURNS = "`loss` must return losses [B, ...], or a pair (losses, {name: metric [B, ...]})"


def _losses_and_metrics(result: Any) -> tuple[Any, dict]:
    """Return losses and metrics from what a loss returned; raise ValueError if it is neither."""
    losses, metrics = result, None
    if isinstance(result, tuple | list):
        if len(result) != 2:
            raise ValueError(f"{_RETURNS}; got a {type(result).__name__} of {len(result)}")
        losses, metrics = result
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"{_RETURNS}; got metrics that are not a dict by names: {metrics}")
    taken = {"loss", "step", "step_time_s"} & set(metrics)
    if taken:
        names = ", ".join(sorted(taken))
        raise ValueError(f"the metrics of `loss` may not be called {names}; use other names")
    return losses, dict(metrics)


def _spread(value: Any, weights: jax.Array) -> Any:
    """Return a Python number among the metrics as that number for each example."""
    # Within a traced loss it is a constant. An array without axes may be a mean over examples.
    is_number = isinstance(value, bool | int | float | np.number | np.bool_)
    return jnp.full(weights.shape, float(value)) if is_number else value


def _of_examples(name: str, values: Any, examples: int) -> jax.Array:
    """Return an array of values of the examples; raise ValueError if it is not one."""
    if not isinstance(values, jax.Array | np.ndarray | np.generic | int | float):
        raise ValueError(f"{_RETURNS}; got a {type(values).__name__} for {name}")
    values = jnp.asarray(values)
    if values.ndim < 1 or values.shape[0] != examples:
        raise ValueError(
            f"`loss` must return one value for each example, an array [{examples}, ...]; got shape "
            f"{list(values.shape)}; do not average over the examples ({name})"
        )
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise ValueError(
            f"`loss` must return real numbers; got {values.dtype} for {name}; take `abs`"
        )
    return values
