"""Copy what can be changed in place, and nothing else."""

import threading
from dataclasses import dataclass, field
from enum import Enum
from random import Random

import numpy as np
import pytest

import nas
from nas.spaces import copies


class Color(Enum):
    """Have one value."""

    RED = 1


@dataclass(frozen=True)
class Frozen:
    """Hold a value that may itself be changed."""

    value: object = ()


@dataclass
class Thawed:
    """Hold a list."""

    widths: list = field(default_factory=lambda: [1, 2])


UNCHANGEABLE = {
    "tuple": (1, "a", None, 0.5),
    "nested": ((1, 2), (3, ("op", 4))),
    "text": "0101",
    "enum": (Color.RED,),
    "frozen": Frozen((1, 2)),
    "set": frozenset({1}),
    "genotype": nas.NASNetSpace(pairs=2).random(Random(0)),
}
CHANGEABLE = {
    "list": [1, 2],
    "list in a tuple": (1, [2]),
    "dict": {"a": [1]},
    "frozen with a list": Frozen([1]),
    "dataclass": Thawed(),
    "array": (np.float32(1),),
}


@pytest.mark.parametrize("kind", UNCHANGEABLE)
def test_a_value_that_cannot_change_is_not_copied(kind) -> None:
    assert copies.own(UNCHANGEABLE[kind]) is UNCHANGEABLE[kind]


@pytest.mark.parametrize("kind", CHANGEABLE)
def test_a_value_that_can_change_is_copied(kind) -> None:
    copied = copies.own(CHANGEABLE[kind])
    assert copied == CHANGEABLE[kind] and not copies.is_immutable(copied)


def test_copies_share_nothing() -> None:
    value = ([1], {"a": np.zeros(2)})
    copied = copies.own(value)
    copied[0].append(2)
    copied[1]["a"][0] = 1
    assert value[0] == [1] and not value[1]["a"].any()


def test_a_value_without_copies_is_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"type list cannot be copied \(.*lock.*\).*frozen datacla"):
        copies.own([threading.Lock()])
