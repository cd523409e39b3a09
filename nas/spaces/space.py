"""Define a search space: a few functions of architectures, which may be any values.

A space of your own is a class with these members; `nas.testing.check_space` tests it.

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
from typing import Any, Protocol, TypeVar, runtime_checkable

from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils.graph_drawing import Picture
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.errors import MismatchError
from nas.spaces import copies

A = TypeVar("A")
REQUIRED = ("name", "random", "mutate", "canonical", "encode", "decode")


class Space(Protocol[A]):
    """Describe a set of architectures of type `A` and their mutations.

    Architectures are compared by `==` and never changed in place. Unless they are immutable, spaces
    and evaluators get copies, so `is` does not find a part again, save members of an `Enum`,
    functions and classes.

    Example:
        >>> import nas
        >>> class Bits:
        ...     name = "20 bits"
        ...     def random(self, rng): return tuple(rng.randrange(2) for _ in range(20))
        ...     def mutate(self, bits, rng):
        ...         i = rng.randrange(20)
        ...         return (*bits[:i], 1 - bits[i], *bits[i + 1 :]), f"flip: bit {i}"
        ...     def encode(self, bits): return "".join(map(str, bits))
        ...     def decode(self, text): return tuple(map(int, text))
        ...     canonical = encode
        >>> nas.testing.check_space(Bits())
    """

    @property
    def name(self) -> str:
        """Name the space in the store; spaces of one name have the same architectures."""
        ...

    def random(self, rng: Random) -> A:
        """Draw an architecture uniformly.

        Args:
            rng: The only source of randomness.

        Returns:
            The architecture.
        """
        ...

    def mutate(self, architecture: A, rng: Random) -> tuple[A, str]:
        """Change an architecture at random.

        Args:
            architecture: The parent, which stays as it is.
            rng: The only source of randomness.

        Returns:
            The child, and a description of the mutation: its kind, a colon and the rest, such as
            `op: normal pair 2, ...`.
        """
        ...

    def canonical(self, architecture: A) -> str:
        """Return a text that two architectures share only if they are the same network.

        The cache finds duplicates by it. If duplicates are unknown, return `encode`.

        Args:
            architecture: The architecture.

        Returns:
            The text.
        """
        ...

    def encode(self, architecture: A) -> str:
        """Write an architecture as text, for the store.

        Args:
            architecture: The architecture.

        Returns:
            One line of text, from which `decode` makes an equal architecture.
        """
        ...

    def decode(self, text: str) -> A:
        """Return the architecture that `encode` wrote.

        Args:
            text: What `encode` wrote.

        Returns:
            The architecture.

        Raises:
            ValueError: `encode` writes no such text.
        """
        ...


@runtime_checkable
class DrawableSpace(Space[A], Protocol[A]):
    """Extend a space with optional members, by which results and pages show architectures.

    Without them an architecture is shown as text. The command `nas report` draws built-in spaces
    only, because it does not run code of the run.
    """

    def pictures(self, architecture: A, before: A | None = None) -> list[Picture]:
        """Draw the architecture's cells, with marks where they differ from those `before`.

        Args:
            architecture: The architecture to draw.
            before: Its parent. Default: none, so that nothing is marked.

        Returns:
            A picture for each cell: `gpipe_jax.utils.graph_drawing.Picture`.
        """
        ...

    def differences(self, architecture: A, before: A) -> list[str]:
        """Describe each difference from another architecture in a line.

        Args:
            architecture: The architecture to describe.
            before: Its parent.

        Returns:
            The lines; none if the architectures are equal.
        """
        ...


@runtime_checkable
class GenotypeSpace(Space[Genotype], Protocol):
    """Describe a space of genotypes, which `nas.TrainingEvaluator` can train."""

    @property
    def pairs(self) -> int:
        """Return the number of pairwise combinations in a cell."""
        ...

    @property
    def operations(self) -> tuple[str, ...]:
        """Return the operations that an element of a pair may be."""
        ...


def _nasnet() -> Space[Any]:
    from nas.spaces.nasnet import NASNetSpace

    return NASNetSpace()


def _nasbench201() -> Space[Any]:
    from nas.spaces.nasbench201 import NASBench201Space

    return NASBench201Space()


SPACES: dict[str, Callable[[], Space[Any]]] = {"nasnet": _nasnet, "nasbench201": _nasbench201}
"""Constructors of the built-in spaces, by the text before the first comma of a space's name."""


def built_in(name: str) -> Space[Any] | None:
    """Return the built-in space that reads architectures of a space of this name, or None.

    The default space of a family reads all of it: `nasnet` also reads those of `nasnet, 3 pairs`.
    """
    make = SPACES.get(name.partition(",")[0])
    return make() if make else None


def named(name: str) -> Space[Any] | None:
    """Return the built-in space of exactly this name, or None.

    >>> named("nasnet, 3 pairs").pairs
    3
    """
    from nas.spaces.nasnet import NASNetSpace

    space = built_in(name)
    if isinstance(space, NASNetSpace):
        try:
            space = NASNetSpace.from_name(name)
        except ValueError:
            return None
    return space if space is not None and space.name == name else None


def decode_stored(space: Space[A], text: str) -> A:
    """Return the architecture that a run's space has written as this text.

    Raises:
        MismatchError: This is not the space of the run: it does not read and write the text alike.
    """
    remedy = "its code is not that of the run; give the space of the run"
    try:
        architecture = space.decode(text)
        again = space.encode(copies.own(architecture))
        is_read = again == text or space.decode(again) == architecture
    except Exception as error:  # a space of the user's may raise anything
        kind = type(error).__name__
        raise MismatchError(
            f"the space {space.name!r} cannot read the architecture {text!r} of the run "
            f"({kind}: {error}): {remedy}"
        ) from error
    if not is_read:
        raise MismatchError(
            f"the space {space.name!r} reads the architecture {text!r} of the run, and writes it "
            f"as {again!r}: {remedy}"
        )
    return architecture


def as_space(space: Any) -> Space[Any]:
    """Return `space`, or the built-in space of that name.

    Raises:
        ValueError: The name is unknown, or the object lacks required members.
    """
    if isinstance(space, str):
        if space not in SPACES:
            raise ValueError(f"space: unknown space {space!r}{did_you_mean_or_list(space, SPACES)}")
        return SPACES[space]()
    problem = _problem(space)
    if problem:
        raise ValueError(
            f"space {space!r} {problem}: give an object with {', '.join(REQUIRED)}, such as "
            "nas.NASNetSpace()"
        )
    return space


def _problem(space: Any) -> str | None:
    """Say why an object is not a space; return None if it may be one."""
    if isinstance(space, type):
        return "is a class"
    absent = [member for member in REQUIRED if not hasattr(space, member)]
    if absent:
        return f"has no {', '.join(absent)}"
    if not (isinstance(space.name, str) and space.name):
        return f"has the name {space.name!r}, which is not a text"
    fixed = [name for name in REQUIRED if name != "name" and not callable(getattr(space, name))]
    return f"has no method {', '.join(fixed)}, only a value of that name" if fixed else None
