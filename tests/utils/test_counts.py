"""Test the check of whole numbers."""

import doctest

import pytest

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import counts


def test_examples() -> None:
    assert doctest.testmod(counts).failed == 0


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_other_values_are_refused(value) -> None:
    with pytest.raises(ArgumentError, match=f"rows {value!r}: .* of at least 1$") as caught:
        counts.check_count("rows", value)
    assert caught.value.argument == "rows"


def test_the_minimum_is_legal() -> None:
    counts.check_count("rows", 1)
    counts.check_count("rows", 0, minimum=0)
