"""Define the cell space of NASNet and AmoebaNet (Real et al. 2019, arXiv:1802.01548)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.genotypes.genotype import (
    INPUTS,
    OPERATIONS,
    PAPER_OPERATIONS,
    Cell,
    Element,
    Genotype,
)
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.graph_drawing import Picture
from nas.keywords import suggesting

CELLS = ("normal", "reduction")
IDENTITY = 0.05  # probability of no mutation; the other two kinds share the rest equally


@suggesting()
@dataclass(frozen=True)
class NASNetSpace:
    """Search two cells of pairwise combinations; an architecture is a `Genotype`.

    A cell's output concatenates the states that no pair reads. The defaults are the paper's: five
    pairs and eight operations, which make (6!)^2 8^10 = 5.6e14 cells.

    Args:
        pairs: Number of pairwise combinations in a cell, at least 1. Default: 5.
        operations: Names of the operations that an element of a pair may be. Default: the paper's
            eight.

    Raises:
        ValueError: `pairs` is not a whole number of at least 1, or an operation is unknown.

    Example:
        >>> from random import Random
        >>> NASNetSpace(pairs=3).name
        'nasnet, 3 pairs'
        >>> len(NASNetSpace().random(Random(0)).normal.pairs)
        5
    """

    pairs: int = 5
    operations: tuple[str, ...] = PAPER_OPERATIONS

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs)
        is_list = isinstance(self.operations, Iterable) and not isinstance(self.operations, str)
        unknown = [name for name in self.operations if name not in OPERATIONS] if is_list else []
        if unknown or not (is_list and self.operations):
            raise ArgumentError(
                "operations",
                f"`operations`: expected some of {', '.join(OPERATIONS)}, got "
                f"{unknown or self.operations!r}; correct them",
            )
        object.__setattr__(self, "operations", tuple(self.operations))

    @property
    def name(self) -> str:
        """Return `nasnet`, followed by what differs from the paper's space."""
        words = ["nasnet"]
        if self.pairs != 5:
            words.append(f"{self.pairs} pairs")
        if self.operations != PAPER_OPERATIONS:
            words.append(f"operations {' '.join(self.operations)}")
        return ", ".join(words)

    @classmethod
    def from_name(cls, name: str) -> "NASNetSpace":
        """Return the space of this name.

        Args:
            name: What `name` of the space returns.

        Returns:
            The space.

        Raises:
            ValueError: No such space has the name.
        """
        fields: dict[str, Any] = {}
        for words in name.split(", ")[1:]:
            first, _, rest = words.partition(" ")
            if first == "operations":
                fields["operations"] = tuple(rest.split())
            else:
                fields["pairs"] = int(first)
        space = cls(**fields)
        if space.name != name:
            raise ValueError(f"space {name!r}: no NASNetSpace has this name")
        return space

    def random(self, rng: Random) -> Genotype:
        """Draw each operation, and each state that is read, uniformly from the possible ones."""
        return Genotype(self._random_cell(rng), self._random_cell(rng))

    def _random_cell(self, rng: Random) -> Cell:
        def element(pair: int) -> Element:
            return rng.choice(self.operations), rng.randrange(INPUTS + pair)

        return Cell.from_pairs([(element(i), element(i)) for i in range(self.pairs)])

    def mutate(self, architecture: Genotype, rng: Random) -> tuple[Genotype, str]:
        """Change nothing, or replace one element's state by another, or its operation by any.

        As in the paper's section "Search space", the new state differs from the old one, and the
        new operation is drawn from the whole list.
        """
        draw = rng.random()
        if draw < IDENTITY:
            return architecture, "identity: nothing"
        kind, i, k = rng.choice(CELLS), rng.randrange(self.pairs), rng.randrange(2)
        cell: Cell = getattr(architecture, kind)
        operation, state = old = cell.pairs[i][k]
        if draw < (1 + IDENTITY) / 2:
            others = [s for s in range(INPUTS + i) if s != state]
            new, mutation = (operation, rng.choice(others)), "hidden_state"
        else:
            new, mutation = (rng.choice(self.operations), state), "op"
        pair = (new, cell.pairs[i][1]) if k == 0 else (cell.pairs[i][0], new)
        child = Cell.from_pairs([*cell.pairs[:i], pair, *cell.pairs[i + 1 :]])
        words = f"{mutation}: {kind} h{i + INPUTS}, {_words(old)} -> {_words(new)}"
        return replace(architecture, **{kind: child}, name=""), words

    def canonical(self, architecture: Genotype) -> str:
        """Return the text that all genotypes with the same two graphs share.

        See `Cell.canonical`.
        """
        return self.encode(architecture.canonical())

    def encode(self, architecture: Genotype) -> str:
        """Return the genotype as one line of JSON."""
        return architecture.to_json()

    def decode(self, text: str) -> Genotype:
        """Read a genotype from JSON.

        Raises:
            ValueError: It is not a genotype; the message says what is wrong.
        """
        return Genotype.from_json(text)

    def pictures(self, architecture: Genotype, before: Genotype | None = None) -> list[Picture]:
        """Draw both cells, with marks where they differ from those `before`."""
        return architecture.pictures(before)

    def differences(self, architecture: Genotype, before: Genotype) -> list[str]:
        """Describe each difference from the genotype `before` in a line."""
        return architecture.differences(before)


def _words(element: Element) -> str:
    return f"{element[0]}(h{element[1]})"
