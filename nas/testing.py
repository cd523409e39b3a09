"""What every search space has to keep, as a check that a space of your own can be put through."""

from random import Random
from typing import Any

from nas.spaces import space as spaces


def check_space(space: Any, *, architectures: int = 50, mutations: int = 20) -> None:
    """Try random architectures and mutations; AssertionError says which rule is broken, by what.

    The rules: chance comes from `rng` alone, nothing is changed in place, `encode` is one line that
    `decode` reads back, `canonical` is a text that depends on the architecture alone, and a
    mutation has its kind before a colon.
    """
    spaces.check(space)
    assert isinstance(space.name, str) and space.name, f"name {space.name!r}: expected a text"
    seen = set()
    for seed in range(architectures):
        architecture, again = space.random(Random(seed)), space.random(Random(seed))
        assert architecture == again, f"random: seed {seed} gave {architecture!r}, then {again!r}"
        seen.add(_check_one(space, architecture))
        rng = Random(seed)
        for _ in range(mutations):
            architecture = _check_mutation(space, architecture, rng)
    assert len(seen) > 1 or architectures == 1, f"random: {architectures} seeds gave one {seen}"


def _check_one(space: Any, architecture: Any) -> str:
    """Returns the architecture as text."""
    text = space.encode(architecture)
    assert isinstance(text, str) and "\n" not in text, f"encode: expected one line, got {text!r}"
    back = space.decode(text)
    assert back == architecture, f"decode: {text!r} became {back!r}, was {architecture!r}"
    canonical = space.canonical(architecture)
    assert isinstance(canonical, str), f"canonical: expected a text, got {canonical!r}"
    assert canonical == space.canonical(back), (
        f"canonical: {architecture!r} has {canonical!r}, then {space.canonical(back)!r}"
    )
    return text


def _check_mutation(space: Any, parent: Any, rng: Random) -> Any:
    before, state = space.encode(parent), rng.getstate()
    child, words = space.mutate(parent, rng)
    assert space.encode(parent) == before, f"mutate: changed its argument {before!r} in place"
    rng.setstate(state)
    again = space.mutate(parent, rng)
    assert again == (child, words), f"mutate: gave {child!r}, then {again[0]!r} by the same chance"
    kind, colon, _ = words.partition(":")
    assert kind and colon, f"mutate: expected words such as 'op: edge 2, a -> b', got {words!r}"
    _check_one(space, child)
    return child
