"""What a search space is: a handful of functions over architectures, which may be any values.

A space of your own is a class with these members; `nas.testing.check_space` says whether it is one.

    class Bits:
        name = "20 bits"
        def random(self, rng): return tuple(rng.randrange(2) for _ in range(20))
        def mutate(self, bits, rng):
            i = rng.randrange(20)
            return (*bits[:i], 1 - bits[i], *bits[i + 1 :]), f"flip: bit {i}"
        def encode(self, bits): return "".join(map(str, bits))
        def decode(self, text): return tuple(map(int, text))
        canonical = encode
"""

from collections.abc import Callable
from random import Random
from typing import Any, Protocol, TypeVar

from gpipe_jax.utils import text as hints

A = TypeVar("A")


class Space(Protocol[A]):
    """Architectures of type `A`, which are compared by `==` and never changed in place."""

    @property
    def name(self) -> str:
        """What the store knows the space by; spaces of one name have the same architectures."""
        ...

    def random(self, rng: Random) -> A:
        """An architecture, every one equally likely; all chance comes from `rng`."""
        ...

    def mutate(self, architecture: A, rng: Random) -> tuple[A, str]:
        """A child, and the mutation in words, its kind before a colon: `op: normal pair 2, ...`."""
        ...

    def canonical(self, architecture: A) -> str:
        """A text that architectures share that are the same network, and no others.

        The cache answers by it. Where nothing is known of equal networks, it is `encode`.
        """
        ...

    def encode(self, architecture: A) -> str:
        """The architecture as one line of text, for the store."""
        ...

    def decode(self, text: str) -> A:
        """The architecture that `encode` wrote; ValueError if it wrote no such text."""
        ...


def _nasnet() -> Space[Any]:
    from nas.spaces.nasnet import NASNetSpace

    return NASNetSpace()


def _nasbench201() -> Space[Any]:
    from nas.spaces.nasbench201 import NASBench201Space

    return NASBench201Space()


SPACES: dict[str, Callable[[], Space[Any]]] = {"nasnet": _nasnet, "nasbench201": _nasbench201}
"""The spaces that come with this package, by name."""


def check(space: Any) -> Space[Any]:
    """`space`, or the one of that name; ValueError if it is none."""
    if isinstance(space, str):
        if space not in SPACES:
            hint = hints.did_you_mean_or_list(space, SPACES)
            raise ValueError(f"space: unknown space {space!r}{hint}")
        return SPACES[space]()
    members = ("name", "random", "mutate", "canonical", "encode", "decode")
    absent = [member for member in members if not hasattr(space, member)]
    if absent or isinstance(space, type):
        problem = "is a class" if isinstance(space, type) else f"has no {', '.join(absent)}"
        raise ValueError(
            f"space {space!r} {problem}: give an object with {', '.join(members)}, such as "
            "nas.NASNetSpace()"
        )
    return space
