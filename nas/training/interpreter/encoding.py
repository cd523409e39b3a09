"""Genotypes as integer arrays, of one shape for all."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.genotypes.genotype import Cell, Genotype

Integers = jax.Array | np.ndarray | np.int32


class Concat(NamedTuple):
    """The states that form a cell's output; of `order` the first `count`, the rest is filling."""

    order: Integers  # [S]
    count: Integers  # []

    def members(self) -> jax.Array:
        """Whether each state is in the output, bool [S]."""
        places = jnp.arange(jnp.size(self.order))
        return ((jnp.asarray(self.order) == places[:, None]) & (places < self.count)).any(1)


class CellCode(NamedTuple):
    """A cell; slot j = 2 i + k is element k of pair i."""

    operations: Integers  # [2 pairs], places in the list of operations
    states: Integers  # [2 pairs], that the slots read
    concat: Concat


class Code(NamedTuple):
    """A genotype."""

    normal: CellCode
    reduction: CellCode


def encode(genotype: Genotype, operations: Sequence[str], pairs: int) -> Code:
    """The genotype with its `operations` as numbers; ValueError if one is not among these."""
    return Code(
        _cell("normal", genotype.normal, operations, pairs),
        _cell("reduction", genotype.reduction, operations, pairs),
    )


def _cell(kind: str, cell: Cell, operations: Sequence[str], pairs: int) -> CellCode:
    if len(cell.pairs) != pairs:
        raise ValueError(
            f"the {kind} cell has {len(cell.pairs)} pairs, but this interpreter's cells have "
            f"{pairs}; make one with `pairs={len(cell.pairs)}`"
        )
    elements = [element for pair in cell.pairs for element in pair]
    unknown = sorted({name for name, _ in elements} - set(operations))
    if unknown:
        raise ValueError(
            f"the {kind} cell has {', '.join(unknown)}, but this interpreter knows "
            f"{', '.join(operations)}; give all that are needed as `operations`"
        )
    filled = [*cell.concat, *[0] * (cell.states - len(cell.concat))]
    return CellCode(
        np.array([operations.index(name) for name, _ in elements], np.int32),
        np.array([state for _, state in elements], np.int32),
        Concat(np.array(filled, np.int32), np.int32(len(cell.concat))),
    )


def whole(states: int) -> Concat:
    """All of so many states, in their order."""
    return Concat(np.arange(states, dtype=np.int32), np.int32(states))
