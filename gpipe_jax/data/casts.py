"""Cast arrays to the types of an example, and refuse values that these types cannot hold."""

from typing import Any

import ml_dtypes
import numpy as np

from gpipe_jax.errors import DataError


def plain(name: str, array: Any) -> np.ndarray:
    """Return an array of any kind as one of NumPy.

    Args:
        name: The name of the array, for messages.
        array: An array of NumPy, JAX or another library, or nested lists of numbers.

    Returns:
        The numbers, not copied if this can be avoided.

    Raises:
        DataError: Numbers are masked, lists differ in length, or there is text.
    """
    if isinstance(array, str | bytes):
        raise DataError(
            f"{name} is the text {array!r}, but a batch holds numbers; give each class a number"
        )
    if np.ma.is_masked(array):
        raise DataError(
            f"{name} is a masked array, and {np.ma.count_masked(array)} of its numbers are masked; "
            f"give weight 0 to such examples, or replace the numbers by `filled(value)`"
        )
    try:
        return np.asarray(array)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} is not an array of numbers ({error}); give one array, with lists of equal "
            f"length"
        ) from None


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return a copy of an array in another type, with the same numbers up to rounding.

    The values are looked at only if the type is narrower than the array's own.

    Args:
        name: The name of the array, for messages.
        array: The array.
        dtype: The type, of the same kind as the array's or of a more general one.

    Returns:
        The copy, in the byte order of this machine.

    Raises:
        DataError: The type is of a less general kind, or cannot hold a number of the array.

    Example:
        >>> cast("labels", np.arange(3), np.int8).dtype
        dtype('int8')
    """
    dtype = np.dtype(dtype)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"{name} has type {array.dtype}, but the pipeline takes {dtype}; convert it first"
        )
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype)
    if _is_integer(dtype):
        limits = ml_dtypes.iinfo(dtype)
        if array.size:
            for value in (array.min(), array.max()):
                if not limits.min <= value <= limits.max:
                    raise _too_large(name, array, dtype, value, limits)
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    lost = ~np.isfinite(narrow)
    if lost.any():
        lost &= np.isfinite(array)
        if lost.any():
            raise _too_large(name, array, dtype, array[lost][0], ml_dtypes.finfo(dtype))
    return narrow


def _is_integer(dtype: np.dtype) -> bool:
    """Return whether a type is one of integers, those of `ml_dtypes` included."""
    return dtype.name.startswith(("int", "uint"))


def _too_large(name: str, array: np.ndarray, dtype: np.dtype, value: Any, limits: Any) -> DataError:
    remedy = "use numbers in this range, or a wider type"
    if dtype.itemsize == 4 and array.dtype.itemsize == 8:
        remedy += " (JAX makes types of 64 bits 32, unless `jax_enable_x64` is on)"
    low, high = limits.min, limits.max
    if not _is_integer(dtype):
        low, high = f"{float(low):g}", f"{float(high):g}"
    return DataError(
        f"{name} of {array.dtype} holds {value}, but the pipeline takes {dtype}, which is from "
        f"{low} to {high}; {remedy}"
    )
