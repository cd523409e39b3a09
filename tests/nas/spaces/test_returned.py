"""Check what the methods of a space return, and the space itself."""

import warnings
from pathlib import Path

import pytest
from searches import Bits, ones

import nas


def search(folder: Path, space) -> nas.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for each proposal that is skipped
        return nas.search(
            space=space, evaluate=ones, population=4, sample=2, cycles=12, folder=folder,
            max_failures=3,
        )  # fmt: skip


class EncodesNumber(Bits):
    def encode(self, bits):
        return 3

    def canonical(self, bits):
        return "all the same"


class CanonicalTuple(Bits):
    def canonical(self, bits):
        return bits


class NoUtf8(Bits):
    def encode(self, bits):
        return "\ud800"


class NoWords(Bits):
    def mutate(self, bits, rng):
        return super().mutate(bits, rng)[0]


class NumbersAsWords(Bits):
    def mutate(self, bits, rng):
        return super().mutate(bits, rng)[0], 3


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (EncodesNumber, r"encode returned 3 \(int\): expected a text"),
        (CanonicalTuple, r"canonical returned \(.*\) \(tuple\): expected a text"),
        (NoUtf8, "encode of the space raised UnicodeEncodeError"),
        (NoWords, r"mutate returned \(.*\) \(tuple\): expected the child and words, such as"),
        (NumbersAsWords, r"mutate returned \(\(.*\), 3\) \(tuple\): expected the child and words"),
    ],
)
def test_a_method_that_returns_something_else(tmp_path, kind, problem) -> None:
    with pytest.raises(nas.FailuresError, match=problem):
        search(tmp_path, kind())


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"name": 3}, "has the name 3, which is not a text: give an object with name, random"),
        ({"name": ""}, "has the name '', which is not a text: give an object with"),
        ({"random": 3}, "has no method random, only a value of that name: give an object"),
    ],
)
def test_a_member_of_another_type(tmp_path, members, problem) -> None:
    space = type("Mine", (Bits,), members)()
    with pytest.raises(ValueError, match=problem):
        search(tmp_path, space)
    with pytest.raises(ValueError, match=problem):
        nas.testing.check_space(space)


def test_operations_of_another_type() -> None:
    for operations in (None, 3, "sep_3x3", ()):
        with pytest.raises(ValueError, match="`operations`: expected some of identity, sep_3x3"):
            nas.NASNetSpace(operations=operations)


@pytest.mark.parametrize("number", [0, "x", 2.5])
def test_numbers_of_a_check(number) -> None:
    with pytest.raises(ValueError, match="`architectures` must be a whole number of at least 1"):
        nas.testing.check_space(Bits(), architectures=number)
