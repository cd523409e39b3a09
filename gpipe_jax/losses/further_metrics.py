"""Compute further metrics beside a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpipe_jax.losses.weighting import HasCount, losses_and_metrics
from gpipe_jax.utils.trees import PyTree


def with_metrics(loss: Callable, metrics: Mapping[str, Callable]) -> Callable:
    """Return a loss that also computes further metrics.

    Args:
        loss: A loss, with or without a method `count`.
        metrics: Functions (outputs, labels) -> numbers [B, ...], by name. They replace metrics of
            the loss that have the same name.

    Returns:
        A function (outputs, labels) -> (losses, metrics), with a method `count` if `loss` has it.

    Example:
        >>> import jax.numpy as jnp
        >>> from gpipe_jax.losses import squared_error
        >>> loss = with_metrics(squared_error, {"error": lambda a, b: abs(a - b)})
        >>> losses, metrics = loss(jnp.array([1.0]), jnp.array([4.0]))
        >>> float(losses[0]), float(metrics["error"][0])
        (9.0, 3.0)
    """
    kind = _CountingLoss if isinstance(loss, HasCount) else _LossWithMetrics
    return kind(loss, tuple(metrics.items()))


@dataclass(frozen=True)
class _LossWithMetrics:
    loss: Any
    further: tuple[tuple[str, Callable], ...]

    def __call__(self, outputs: PyTree, labels: PyTree) -> tuple[Any, dict]:
        losses, metrics = losses_and_metrics(self.loss(outputs, labels))
        return losses, {**metrics, **{name: f(outputs, labels) for name, f in self.further}}


class _CountingLoss(_LossWithMetrics):
    def count(self, labels: PyTree) -> Any:
        return self.loss.count(labels)
