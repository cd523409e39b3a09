"""The cell space of NASNet and AmoebaNet (Real et al. 2019, https://arxiv.org/abs/1802.01548)."""

from dataclasses import dataclass, replace
from random import Random

from gpipe_jax.genotypes.genotype import (
    INPUTS,
    OPERATIONS,
    PAPER_OPERATIONS,
    Cell,
    Element,
    Genotype,
)

CELLS = ("normal", "reduction")
IDENTITY = 0.05  # the probability of no mutation; the other two share the rest equally


@dataclass(frozen=True)
class NASNetSpace:
    """Two cells of pairwise combinations; a cell's output is the states that no pair reads.

    With the defaults, the paper's: five pairs and eight operations, which makes
    (6!)^2 8^10 = 5.6e14 cells.
    """

    pairs: int = 5
    operations: tuple[str, ...] = PAPER_OPERATIONS

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"`pairs` {self.pairs}: a cell has at least one pair; give 1 or more")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations:
            raise ValueError(
                f"`operations`: expected some of {', '.join(OPERATIONS)}, got "
                f"{unknown or self.operations!r}; correct them"
            )
        object.__setattr__(self, "operations", tuple(self.operations))

    @property
    def name(self) -> str:
        """`nasnet`, and where it is not the paper's space what differs."""
        changed = [f"{self.pairs} pairs"] * (self.pairs != 5)
        if self.operations != PAPER_OPERATIONS:
            changed.append(f"operations {' '.join(self.operations)}")
        return ", ".join(["nasnet", *changed])

    def random(self, rng: Random) -> Genotype:
        """Each operation and each state that is read: one of those possible, equally likely."""
        return Genotype(self._random_cell(rng), self._random_cell(rng))

    def _random_cell(self, rng: Random) -> Cell:
        def element(pair: int) -> Element:
            return rng.choice(self.operations), rng.randrange(INPUTS + pair)

        return Cell.from_pairs([(element(i), element(i)) for i in range(self.pairs)])

    def mutate(self, architecture: Genotype, rng: Random) -> tuple[Genotype, str]:
        """Identity, or one element's state replaced by another, or its operation by any.

        As in the paper's section "Search space" the new state differs from the old one, while the
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
        """Of all genotypes with the same two graphs; see `Cell.canonical`."""
        return self.encode(architecture.canonical())

    def encode(self, architecture: Genotype) -> str:
        """As JSON."""
        return architecture.to_json()

    def decode(self, text: str) -> Genotype:
        """From JSON; ValueError says what is wrong."""
        return Genotype.from_json(text)


def _words(element: Element) -> str:
    return f"{element[0]}(h{element[1]})"
