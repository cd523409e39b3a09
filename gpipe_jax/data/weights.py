"""Check the weights of examples, and scale them to a sum of one."""

import numpy as np

from gpipe_jax.errors import DataError

NAME = "batch['weights']"


def check_type(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Check that there is one real number or bool for each example.

    Args:
        name: The name of the weights, for messages.
        shape: Their shape.
        dtype: Their type.

    Raises:
        DataError: They have another shape or type.
    """
    is_real = np.can_cast(dtype, np.float64, "same_kind")
    if len(shape) != 1 or not is_real:
        raise DataError(
            f"{name} has shape {list(shape)} and type {dtype}; give one real number for each "
            f"example"
        )


def total(weights: np.ndarray) -> float:
    """Return the sum of the weights of a batch.

    Args:
        weights: The weight of each example, [N].

    Returns:
        The sum, more than zero and finite.

    Raises:
        DataError: A weight is negative or not finite, all are zero, or the sum overflows.

    Example:
        >>> total(np.array([1.0, 0.0, 0.5]))
        1.5
    """
    check_type(NAME, weights.shape, weights.dtype)
    weights = weights.astype(np.float64)
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{NAME}[{row}] is {weights[row]}; a weight must be finite and at least 0; use 0 for "
            f"an example that does not count"
        )
    with np.errstate(over="ignore"):
        result = float(weights.sum())
    if not result > 0:
        raise DataError(f"the weights of a batch must sum to more than 0, got {result}")
    if result == np.inf:
        raise DataError(
            f"the weights of a batch must have a finite sum, got {len(weights)} of up to "
            f"{weights.max()}; divide them by the largest"
        )
    return result


def scaled(weights: np.ndarray, examples: int) -> np.ndarray:
    """Return the weights of a batch, scaled to a sum of one and padded with zeros.

    Args:
        weights: The weight of each example, [<= examples].
        examples: N, the examples of a full batch.

    Returns:
        The weights [N], in float64.

    Raises:
        DataError: `total` refuses them.
    """
    whole, padding = total(weights), np.zeros(examples - len(weights))
    return np.concatenate([weights.astype(np.float64) / whole, padding])
