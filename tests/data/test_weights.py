"""Check which weights of examples are accepted, and how they are scaled."""

import doctest
import warnings

import numpy as np
import pytest

from gpipe_jax.data import weights
from gpipe_jax.errors import DataError


def test_examples() -> None:
    assert doctest.testmod(weights).failed == 0


@pytest.mark.parametrize("kind", [bool, int, np.uint8, np.float16, np.float32, float])
def test_they_are_scaled_and_padded(kind: type) -> None:
    have = weights.scaled(np.array([1, 0, 1, 0], kind), 6)
    np.testing.assert_array_equal(have, [0.5, 0, 0.5, 0, 0, 0])


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300])
def test_their_scale_does_not_matter(scale: float) -> None:
    np.testing.assert_allclose(weights.scaled(np.full(4, scale), 4), 0.25)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [1, np.inf],
            r"batch\['weights'\]\[1\] is inf; a weight must be finite and at least 0; use 0",
        ),
        ([np.nan, 1], r"\[0\] is nan; a weight must be finite"),
        ([2.0, -0.5], r"\[1\] is -0.5; a weight must be finite and at least 0"),
        ([0.0, 0.0], r"the weights of a batch must sum to more than 0, got 0.0"),
        (
            [1e308] * 3,
            r"must have a finite sum, got 3 of up to 1e\+308; divide them by the largest",
        ),
        ([[1.0], [1.0]], r"has shape \[2, 1\] and type float64; give one real number for each"),
        ([1j, 1], r"has shape \[2\] and type complex128; give one real number"),
        (["a"], r"has shape \[1\] and type <U1; give one real number"),
    ],
)
def test_others_are_refused(given: list, said: str) -> None:
    with warnings.catch_warnings(), pytest.raises(DataError, match=said):
        warnings.simplefilter("error")
        weights.scaled(np.array(given), 4)
