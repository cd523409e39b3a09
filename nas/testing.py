"""Check that a search space of your own keeps the rules of `nas.Space`."""

from random import Random
from typing import Any

from gpipe_jax.utils.checks import check_count, check_counts
from nas.spaces import copies
from nas.spaces import space as spaces


def check_space(space: Any, *, architectures: int = 50, mutations: int = 20) -> None:
    """Try random architectures and mutations of a search space.

    The rules: `rng` is the only source of randomness. Nothing is changed in place. `encode` returns
    one line that `decode` reads back. `canonical` returns a text that depends on the architecture
    alone. `mutate` returns words with a kind before a colon.

    Args:
        space: The search space.
        architectures: Number of random architectures.
        mutations: Number of successive mutations of each.

    Raises:
        AssertionError: A rule is broken; the message says which one, and by what.
        ValueError: `space` lacks required members, or a number is not legal.

    Example:
        >>> from nas.spaces.nasnet import NASNetSpace
        >>> check_space(NASNetSpace(pairs=2), architectures=3, mutations=3)
    """
    space = spaces.as_space(space)
    check_counts(architectures=architectures)
    check_count("mutations", mutations, minimum=0)
    texts = set()
    for seed in range(architectures):
        architecture, again = space.random(Random(seed)), space.random(Random(seed))
        assert architecture == again, f"random: seed {seed} gave {architecture!r}, then {again!r}"
        kept = copies.own(architecture)
        space.random(Random(seed + 1))
        assert architecture == kept, f"random: changed its last result {kept!r} in place"
        texts.add(_check_architecture(space, architecture))
        rng = Random(seed)
        for _ in range(mutations):
            architecture = _check_mutation(space, architecture, rng)
    assert len(texts) > 1 or architectures == 1, f"random: {architectures} seeds gave one {texts}"


def _check_architecture(space: Any, architecture: Any) -> str:
    """Check text and canonical form; return the text."""
    kept = copies.own(architecture)
    text = space.encode(architecture)
    assert architecture == kept, f"encode: changed its argument {kept!r} in place"
    assert isinstance(text, str) and "\n" not in text, f"encode: expected one line, got {text!r}"
    decoded = space.decode(text)
    assert decoded == architecture, f"decode: {text!r} became {decoded!r}, was {architecture!r}"
    canonical = space.canonical(architecture)
    assert architecture == kept, f"canonical: changed its argument {kept!r} in place"
    assert isinstance(canonical, str), f"canonical: expected a text, got {canonical!r}"
    assert canonical == space.canonical(decoded), (
        f"canonical: {architecture!r} has {canonical!r}, then {space.canonical(decoded)!r}"
    )
    return text


def _check_mutation(space: Any, parent: Any, rng: Random) -> Any:
    """Check one mutation; return the child."""
    before, state = space.encode(parent), rng.getstate()
    child, words = space.mutate(parent, rng)
    assert space.encode(parent) == before, f"mutate: changed its argument {before!r} in place"
    rng.setstate(state)
    again = space.mutate(parent, rng)
    assert again == (child, words), f"mutate: gave {child!r}, then {again[0]!r} by the same chance"
    kind, colon, _ = words.partition(":")
    assert kind and colon, f"mutate: expected words such as 'op: edge 2, a -> b', got {words!r}"
    _check_architecture(space, child)
    return child
