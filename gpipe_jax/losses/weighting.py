"""Weigh the losses of examples, so that their sum is the mean over the whole batch."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.utils.trees import PyTree


@runtime_checkable
class HasCount(Protocol):
    """Describe a loss with a method `count`: how much an example counts, beside its weight."""

    def __call__(self, outputs: PyTree, labels: PyTree) -> Any:
        """Return what every loss returns."""
        ...

    def count(self, labels: PyTree) -> jax.Array:
        """Return a number of at least 0 for each example, [B]."""
        ...


def count_elements(loss: Callable, labels: PyTree, weights: jax.Array) -> jax.Array:
    """Return what each example counts: its weight, times its count if the loss counts.

    Args:
        loss: A loss, with or without a method `count`.
        labels: The labels of the examples.
        weights: The weight of each example, [B].

    Returns:
        Numbers of the weights' type, [B].

    Raises:
        ValueError: `count` does not return one real number for each example.

    Example:
        >>> from gpipe_jax.losses import token_cross_entropy
        >>> labels = jnp.array([[1, 2], [3, -100]])
        >>> count_elements(token_cross_entropy(), labels, jnp.array([0.5, 0.5])).tolist()
        [1.0, 0.5]
    """
    if not isinstance(loss, HasCount):
        return weights
    count = jnp.asarray(loss.count(labels))
    if count.shape != weights.shape or jnp.issubdtype(count.dtype, jnp.complexfloating):
        raise ValueError(
            f"the method `count` of the loss must return one real number for each example, "
            f"{list(weights.shape)}; got shape {list(count.shape)} of {count.dtype}"
        )
    return jnp.where(weights == 0, 0, weights * count.astype(weights.dtype))


def with_counts(
    loss: Callable,
    labels: PyTree,
    weights: jax.Array,
    sum_over_replicas: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Return the weights of a whole batch, scaled to a sum of one with the counts of the loss.

    Args:
        loss: A loss. Without a method `count` the weights stay as they are.
        labels: The labels of the batch, or of one replica's part.
        weights: The weights of the same examples, [N], which sum to one over the batch.
        sum_over_replicas: Sums a number over the replicas, if this is a part. Default: None.

    Returns:
        The weights, [N]. They are zeros if nothing counts.

    Example:
        >>> from gpipe_jax.losses import token_cross_entropy
        >>> labels = jnp.array([[1, 2], [3, -100]])
        >>> weights = with_counts(token_cross_entropy(), labels, jnp.array([0.5, 0.5]))
        >>> [round(weight, 2) for weight in weights.tolist()]
        [0.67, 0.33]
    """
    if not isinstance(loss, HasCount):
        return weights
    counts = count_elements(loss, labels, weights)
    total = counts.sum() if sum_over_replicas is None else sum_over_replicas(counts.sum())
    return counts / jnp.where(total > 0, total, 1)


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
        >>> from gpipe_jax.losses import squared_error
        >>> outputs, labels = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
        >>> float(weighted_sums(squared_error, outputs, labels, jnp.array([0.5, 0.5]))[0])
        2.0
    """
    losses, metrics = losses_and_metrics(loss(outputs, labels))

    def weigh(name: str, values: Any) -> jax.Array:
        values = _of_examples(name, values, weights.shape[0])
        per_example = values.reshape(values.shape[0], -1).mean(axis=1)
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weighted = per_example.astype(dtype) * weights.astype(dtype)
        return jnp.where(weights == 0, 0, weighted).sum()  # also if an example's value is NaN

    sums = {name: weigh(f"metric {name!r}", _spread(a, weights)) for name, a in metrics.items()}
    return weigh("the losses", losses), sums


RESERVED = frozenset({"loss", "step", "step_time_s"})
"""Names that every record of a step uses itself."""

_RETURNS = "`loss` must return losses [B, ...], or a pair (losses, {name: metric [B, ...]})"


def losses_and_metrics(result: Any) -> tuple[Any, dict]:
    """Return losses and metrics from what a loss returned; raise ValueError if it is neither."""
    losses, metrics = result, None
    if isinstance(result, tuple | list):
        if len(result) != 2:
            raise ValueError(f"{_RETURNS}; got a {type(result).__name__} of {len(result)}")
        losses, metrics = result
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"{_RETURNS}; got metrics that are not a dict by names: {metrics}")
    taken = RESERVED & set(metrics)
    if taken:
        names = ", ".join(sorted(taken))
        raise ValueError(f"the metrics of `loss` may not be called {names}; use other names")
    return losses, dict(metrics)


def _spread(value: Any, weights: jax.Array) -> Any:
    """Return a Python number among the metrics as that number for each example."""
    return jnp.full(weights.shape, float(value)) if is_number(value) else value


def is_number(value: Any) -> bool:
    """Return whether a metric is a Python number, which counts for each example."""
    # Within a traced loss it is a constant. An array without axes may be a mean over examples.
    return isinstance(value, bool | int | float | np.number | np.bool_)


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
