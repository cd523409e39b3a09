"""Test the checks of whole numbers and of fractions."""

import doctest
import math

import numpy as np
import pytest

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import checks


def test_examples() -> None:
    assert doctest.testmod(checks).failed == 0


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_other_values_are_refused(value) -> None:
    message = f"^`rows` must be a whole number of at least 1, got {value!r}$"
    with pytest.raises(ArgumentError, match=message) as caught:
        checks.check_count("rows", value)
    assert caught.value.argument == "rows"


def test_the_first_illegal_count_is_named() -> None:
    checks.check_counts(rows=1, columns=2)
    with pytest.raises(ArgumentError, match=r"`columns` must be .*, got 0"):
        checks.check_counts(rows=1, columns=0, tables=0)


def test_the_minimum_is_legal() -> None:
    checks.check_count("rows", 1)
    checks.check_count("rows", np.int64(1))
    checks.check_count("rows", 0, minimum=0)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan])
@pytest.mark.parametrize("zero", [False, True])
def test_numbers_out_of_range_are_no_fractions(value: float, zero: bool) -> None:
    least = "at least" if zero else "more than"
    message = f"^`part` must be {least} 0 and less than 1, got {value}$"
    with pytest.raises(ArgumentError, match=message) as caught:
        checks.check_fraction("part", value, zero=zero)
    assert caught.value.argument == "part"


def test_zero_is_a_fraction_unless_excluded() -> None:
    checks.check_fraction("part", 0)
    checks.check_fraction("part", 0.5, zero=False)
    with pytest.raises(ArgumentError, match="more than 0"):
        checks.check_fraction("part", 0, zero=False)
