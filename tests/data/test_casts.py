"""Check that a cast keeps every number, or refuses."""

import doctest
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gpipe_jax.data import casts
from gpipe_jax.errors import DataError

bfloat16, int4, float8 = ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn


def test_examples() -> None:
    assert doctest.testmod(casts).failed == 0


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([-(2**31), 2**31 - 1]), np.int32),
        (np.array([0, 255], np.uint16), np.uint8),
        (np.array([7, -8]), int4),
        (np.array([1e38, -np.inf, np.nan]), np.float32),
        (np.array([65504.0, 1e-30], np.float32), np.float16),
        (np.array([3, 4]), np.float16),
        (np.array([1e38, 2.0], np.float32), bfloat16),
        (np.array([1 + 2j]), np.complex64),
        (np.array([True, False]), np.int8),
        (np.array([], np.int64), np.int8),
        (np.array([1.5, 2.5], ">f4"), np.float32),
        (np.array([1, 2], ">i8"), np.int32),
    ],
)
def test_numbers_that_fit_are_kept(array: np.ndarray, dtype: type) -> None:
    have = casts.cast("x", array, dtype)
    assert have.dtype == np.dtype(dtype) and have.dtype.isnative
    assert not np.shares_memory(have, array)
    np.testing.assert_array_equal(have, array.astype(array.dtype.newbyteorder("=")).astype(dtype))


@pytest.mark.parametrize(
    ("array", "dtype", "said"),
    [
        (np.array([0, 2**32]), np.int32, r"x of int64 holds 4294967296, but .* takes int32, .*x64"),
        (
            np.array([0, -(2**40)]),
            np.int32,
            r"holds -1099511627776, .* from -2147483648 to 21474836",
        ),
        (np.array([2**63], np.uint64), np.int32, r"x of uint64 holds 9223372036854775808"),
        (
            np.array([256], np.uint16),
            np.uint8,
            r"holds 256, but .* uint8, which is from 0 to 255; us",
        ),
        (np.array([128], np.uint8), np.int8, r"holds 128, but .* int8, which is from -128 to 127"),
        (np.array([8]), int4, r"holds 8, but .* int4, which is from -8 to 7"),
        (
            np.array([1.0, 1e30], np.float32),
            np.float16,
            r"holds .*e\+30, but .* float16, which is from -65504 to",
        ),
        (np.array([-1e39]), np.float32, r"x of float64 holds -1e\+39, .* from -3.40282e\+38 to"),
        (np.array([70_000]), np.float16, r"x of int64 holds 70000, but .* float16"),
        (np.array([3.4e38], np.float32), bfloat16, r"holds 3.\d*e\+38, but .* bfloat16"),
        (
            np.array([1e9], np.float32),
            float8,
            r"holds 1000000000.0, .* from -448 to 448",
        ),
        (np.array([1e39 + 0j]), np.complex64, r"but .* complex64"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(array: np.ndarray, dtype: type, said: str) -> None:
    with warnings.catch_warnings(), pytest.raises(DataError, match=said):
        warnings.simplefilter("error")
        casts.cast("x", array, dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(float, np.int32), (complex, np.float32), (int, np.uint8), (int, bool)]
)
def test_other_kinds_are_refused(kind: type, dtype: type) -> None:
    said = f"x has type {np.dtype(kind)}, but the pipeline takes {np.dtype(dtype)}; convert it"
    with pytest.raises(DataError, match=said):
        casts.cast("x", np.ones(2, kind), dtype)


def test_arrays_of_any_kind_become_those_of_numpy() -> None:
    masked = np.ma.masked_array([1.0, 2.0], [False, False])
    for a in ([1.0, 2.0], (1.0, 2.0), jnp.array([1.0, 2.0]), masked):
        have = casts.plain("x", a)
        assert type(have) is np.ndarray
        np.testing.assert_array_equal(have, [1, 2])


def test_masked_numbers_are_refused() -> None:
    masked = np.ma.masked_array([1.0, 2.0, 3.0], [True, False, True])
    with pytest.raises(DataError, match=r"x is a masked array, and 2 of .*; give weight 0 to such"):
        casts.plain("x", masked)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match=r"x is not an array of numbers \(.*; give one array"):
        casts.plain("x", [[1, 2], [3]])
