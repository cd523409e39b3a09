"""Names of parameters, patterns that match them, and the message for patterns that do not."""

import re

import pytest

import gpipe_jax as gpipe
from gpipe_jax.layers import leaf_names

NAMES = [("0.linear.kernel", "Dense.linear.kernel"), ("10.linear.bias", "Head.linear.bias")]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("0.linear.kernel", [True, False]),
        ("0", [True, False]),
        ("1", [False, False]),
        ("Dense", [True, False]),
        ("*.linear", [True, True]),
        ("*bias", [False, True]),
        ("dense", [False, False]),
    ],
)
def test_pattern_matches_a_name_or_its_beginning(pattern: str, matched: list[bool]) -> None:
    assert [leaf_names.matches([pattern], names) for names in NAMES] == matched


def test_layers_are_named_by_index_and_by_kind() -> None:
    dense = gpipe.zoo.mlp((4, 8, 2))[0]
    tied = dense.tie("w", "linear.kernel")
    for layer in (dense, tied):
        assert leaf_names.names(3, layer, "linear.bias") == ("3.linear.bias", "Dense.linear.bias")


def test_patterns_that_match_are_accepted() -> None:
    leaf_names.check_used("frozen", ["0", "Head.*"], NAMES)


def test_unknown_patterns_are_one_message() -> None:
    message = (
        "`frozen` has patterns that match no parameter: 'Dence'; did you mean 'Dense'?, 'zzz' "
        "(parameters are named 0.linear.kernel, "
    )
    with pytest.raises(gpipe.errors.ArgumentError, match=re.escape(message)) as caught:
        leaf_names.check_used("frozen", ["0", "Dence", "zzz"], NAMES)
    assert caught.value.argument == "frozen"


@pytest.mark.parametrize("patterns", ["0.*", 3])
def test_patterns_must_be_a_list(patterns: object) -> None:
    with pytest.raises(gpipe.errors.ArgumentError, match="must be a list of patterns, got"):
        leaf_names.check_used("trainable", patterns, NAMES)
