"""Define losses of single outputs: squared errors, and cross entropies of yes or no."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpipe_jax.losses.elements import Counted
from gpipe_jax.utils.checks import check_fraction


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
    _check_equal_shapes(outputs, labels)
    return jnp.square(outputs - labels)


def binary_cross_entropy(*, label_smoothing: float = 0.0) -> Callable:
    """Return the loss of independent yes-or-no outputs, the mean over all of the batch.

    Args:
        label_smoothing: e in [0, 1). The target moves from the label by e / 2 of the way to 1 minus
            the label. Default: 0.

    Returns:
        A function (logits [B, ...], labels [B, ...]) -> (losses [B], {"accuracy": [B]}). The labels
        are 0, 1 or probabilities between. They may also be {"labels": array, "weights": weights of
        the same shape}; see `losses.counted`. Equal arguments give equal functions.

    Raises:
        ValueError: `label_smoothing` is out of range; or, in a call, the shapes differ.

    Example:
        >>> loss = binary_cross_entropy()
        >>> losses, _ = loss(jnp.zeros((1, 2)), jnp.array([[0, 1]]))
        >>> float(losses[0])  # log(2)
        0.6931471824645996
    """
    check_fraction("label_smoothing", label_smoothing)
    return Counted(_BinaryCrossEntropy(label_smoothing))


@dataclass(frozen=True)
class _BinaryCrossEntropy:
    label_smoothing: float

    def __call__(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
        _check_equal_shapes(logits, labels)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        labels = labels.astype(logits.dtype)
        accuracy = ((logits > 0) == (labels > 0.5)).astype(logits.dtype)
        targets = labels + self.label_smoothing * (0.5 - labels)
        return jax.nn.softplus(logits) - targets * logits, {"accuracy": accuracy}


def _check_equal_shapes(outputs: jax.Array, labels: jax.Array) -> None:
    if outputs.shape != labels.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, but outputs {list(outputs.shape)}; "
            f"make the shapes equal, as they are not broadcast"
        )
