"""Test the formatting of text for people."""

import doctest

import pytest

from gpipe_jax.utils import text


def test_examples():
    assert doctest.testmod(text).failed == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (2**31, "2.00 GiB")],
)
def test_bytes(size, expected):
    assert text.format_bytes(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 ms"), (1.5e-4, "0.15 ms"), (0.25, "250 ms"), (1, "1 s"), (83.21, "83.2 s")],
)
def test_seconds(seconds, expected):
    assert text.format_seconds(seconds) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.123456, "0.1235"), (12, "12"), (None, "None")])
def test_values(value, expected):
    assert text.format_value(value) == expected


def test_suggestions():
    assert text.did_you_mean("mesch", ["mesh", "model"]) == "; did you mean 'mesh'?"
    assert text.did_you_mean("qqq", ["mesh", "model"]) == text.did_you_mean(3, ["mesh"]) == ""
    for given in ("1f1b_eager", "1fb_eager"):
        near = text.did_you_mean(given, ["1f1b", "eager_1f1b", "gpipe"])
        assert near == "; did you mean 'eager_1f1b'?", given
    assert text.did_you_mean_or_list("qqq", ["mesh", "model"]) == "; known: mesh, model"


def test_a_table_is_aligned():
    rows = [("name", "n"), ("a", "100")]
    assert text.text_table(rows) == "name  n\n----  ---\na     100"
    assert text.text_table(rows, align_right=True) == "name    n\n----  ---\n   a  100"


def test_figures_are_a_table_without_a_head():
    assert text.figures_table({"a": 100, "loss": 0.123456}) == "a     100\nloss  0.1235"
