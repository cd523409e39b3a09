"""Define losses that are the mean over those elements of a batch that count, such as tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.losses.weighting import losses_and_metrics
from gpipe_jax.utils.trees import PyTree

_FORM = "labels must be an array [B, ...], or {'labels': array, 'weights': array of the same shape}"


def counted(loss: Callable, *, ignore_index: int | None = None) -> Callable:
    """Return the loss that is the weighted mean of `loss` over the elements of the whole batch.

    Other losses give each example the same share of the mean. Here an example's share is its weight
    times the sum of its elements' weights, whatever the number of micro-batches and replicas. An
    element of weight 0 is computed with output and label 0, so it cannot make a gradient NaN. A
    batch without any element that counts has loss 0.

    Args:
        loss: A function (outputs, labels) -> losses of the labels' shape, or (losses, metrics of
            that shape).
        ignore_index: The label of elements that do not count. Default: None, all count.

    Returns:
        A function (outputs, labels) -> (losses [B], metrics [B]), with a method `count`. The labels
        are an array [B, ...], or {"labels": array, "weights": weights of the same shape, each at
        least 0}. Equal arguments give equal functions.

    Example:
        >>> from gpipe_jax.losses import squared_error
        >>> loss = counted(squared_error)
        >>> labels = {"labels": jnp.zeros((1, 3)), "weights": jnp.array([[1.0, 1.0, 0.0]])}
        >>> losses, _ = loss(jnp.array([[2.0, 4.0, 6.0]]), labels)
        >>> losses.tolist(), loss.count(labels).tolist()
        ([10.0], [2.0])
    """
    return Counted(loss, ignore_index)


@dataclass(frozen=True)
class Counted:
    """Average a loss over the elements that count; see `counted`."""

    loss: Callable
    ignore_index: int | None = None

    def __call__(self, outputs: PyTree, labels: PyTree) -> tuple[jax.Array, dict]:
        """Return the means over each example's elements that count, 0 if there are none."""
        values, weights = self._elements(labels)
        used = weights > 0
        outputs = jax.tree.map(lambda a: _zero_unless(used, a), outputs)
        losses, metrics = losses_and_metrics(self.loss(outputs, _zero_unless(used, values)))

        def mean(name: str, a: jax.Array) -> jax.Array:
            if jnp.shape(a) != used.shape:
                raise ValueError(
                    f"`counted` needs one value for each label, {list(used.shape)}; got shape "
                    f"{list(jnp.shape(a))} for {name}; do not average in the loss"
                )
            dtype = jnp.promote_types(a.dtype, jnp.float32)
            a = jnp.where(used, a.astype(dtype), 0)
            total = _sum_of_examples(a * weights.astype(dtype))
            count = self.count(labels).astype(dtype)
            return total / jnp.where(count > 0, count, 1)

        return mean("the losses", losses), {name: mean(name, a) for name, a in metrics.items()}

    def count(self, labels: PyTree) -> jax.Array:
        """Return the sum of the weights of each example's elements, [B]."""
        return _sum_of_examples(self._elements(labels)[1])

    def _elements(self, labels: Any) -> tuple[jax.Array, jax.Array]:
        """Return the label and the weight of each element."""
        if isinstance(labels, Mapping) and set(labels) == {"labels", "weights"}:
            return labels["labels"], self._used(labels["labels"], labels["weights"])
        if not isinstance(labels, jax.Array | np.ndarray):
            raise ValueError(f"{_FORM}; got a {type(labels).__name__}")
        labels = jnp.asarray(labels)
        return labels, self._used(labels, jnp.ones(labels.shape, float))

    def _used(self, labels: Any, weights: Any) -> jax.Array:
        """Return the weights of labels in float32 at least, 0 for those to ignore."""
        if weights.shape != labels.shape:
            raise ValueError(
                f"{_FORM}; got labels {list(labels.shape)}, weights {list(weights.shape)}"
            )
        weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
        if self.ignore_index is not None:
            weights = jnp.where(labels == self.ignore_index, 0, weights)
        return weights


def _zero_unless(used: jax.Array, a: jax.Array) -> jax.Array:
    """Return an array [B, ...] with zeros at the elements that are not used."""
    if a.shape[: used.ndim] != used.shape:
        raise ValueError(
            f"the outputs {list(a.shape)} do not begin with the shape of the labels, "
            f"{list(used.shape)}; make the two agree"
        )
    mask = used.reshape(*used.shape, *(1,) * (a.ndim - used.ndim))
    return jnp.where(mask, a, jnp.zeros((), a.dtype))


def _sum_of_examples(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0], -1).sum(1)
