"""Check that the tests use only XLA flags that the installed jaxlib knows."""

import os

import xla_flags


def test_unknown_flags_are_left_out() -> None:
    chosen = [flag for flag in xla_flags.FLAGS if flag in os.environ["XLA_FLAGS"].split()]
    unknown = ("--xla_no_such_flag=1", "--xla_neither_this_one=2")
    assert chosen and xla_flags.known_flags((*chosen, *unknown)) == chosen
