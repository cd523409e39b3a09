"""Compute further metrics beside a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.losses.weighting import RESERVED, HasCount, is_number, losses_and_metrics
from gpipe_jax.utils.trees import PyTree, describe


def with_metrics(loss: Callable, metrics: Mapping[str, Callable]) -> Callable:
    """Return a loss that also computes further metrics.

    Args:
        loss: A loss, with or without a method `count`.
        metrics: Functions (outputs, labels) -> numbers [B, ...], by name. They replace metrics of
            the loss that have the same name.

    Returns:
        A function (outputs, labels) -> (losses, metrics), with a method `count` if `loss` has it.

    Raises:
        ArgumentError: A metric has a reserved name; or, in a call, it does not take outputs and
            labels, or returns no number for each example.

    Example:
        >>> import jax.numpy as jnp
        >>> from gpipe_jax.losses import squared_error
        >>> loss = with_metrics(squared_error, {"error": lambda a, b: abs(a - b)})
        >>> losses, metrics = loss(jnp.array([1.0]), jnp.array([4.0]))
        >>> float(losses[0]), float(metrics["error"][0])
        (9.0, 3.0)
    """
    taken = sorted(RESERVED & set(metrics))
    if taken:
        raise ArgumentError(
            "metrics",
            f"`metrics` has {taken[0]!r}, a name that every record uses itself; give this metric "
            f"another `name`",
        )
    kind = _CountingLoss if isinstance(loss, HasCount) else _LossWithMetrics
    return kind(loss, tuple(metrics.items()))


@dataclass(frozen=True)
class _LossWithMetrics:
    loss: Any
    further: tuple[tuple[str, Callable], ...]

    def __call__(self, outputs: PyTree, labels: PyTree) -> tuple[Any, dict]:
        losses, metrics = losses_and_metrics(self.loss(outputs, labels))
        further = {name: _values(name, f, outputs, labels) for name, f in self.further}
        return losses, {**metrics, **further}


class _CountingLoss(_LossWithMetrics):
    def count(self, labels: PyTree) -> Any:
        return self.loss.count(labels)


def _values(name: str, metric: Callable, outputs: PyTree, labels: PyTree) -> Any:
    """Return the values of a metric; raise ArgumentError if they are not those of examples."""
    what = f"`metrics` has {name!r}, which"
    try:
        values = metric(outputs, labels)
    except Exception as error:
        raise ArgumentError(
            "metrics",
            f"{what} does not take outputs {describe(outputs)} with labels {describe(labels)}: "
            f"{error}; change the function",
        ) from error
    examples = jax.tree.leaves(outputs)[0].shape[0]
    if not is_number(values) and getattr(values, "shape", ())[:1] != (examples,):
        got = describe(values) if hasattr(values, "shape") else f"a {type(values).__name__}"
        raise ArgumentError(
            "metrics",
            f"{what} must return one number for each example, an array [{examples}, ...]; got "
            f"{got}; do not average over the examples",
        )
    return values
