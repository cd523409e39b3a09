"""Encode genotypes as integer arrays whose shapes are the same for all genotypes of a space."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.genotypes.genotype import Cell, Genotype

Integers = jax.Array | np.ndarray | np.int32


class Concat(NamedTuple):
    """List the states that are concatenated to form a cell's output.

    These are the first `count` of `order`; the rest of `order` is padding.
    """

    order: Integers  # [S]
    count: Integers  # []

    def members(self) -> jax.Array:
        """Return which states are in the output, bool [S]."""
        positions = jnp.arange(jnp.size(self.order))
        is_equal = jnp.asarray(self.order) == positions[:, None]
        return (is_equal & (positions < self.count)).any(1)


class CellEncoding(NamedTuple):
    """Encode a cell. Slot j = 2 i + k is element k of pair i."""

    operations: Integers  # [slots], indices into the list of operations
    states: Integers  # [slots], indices of the states that the slots read
    concat: Concat


class Encoding(NamedTuple):
    """Encode a genotype."""

    normal: CellEncoding
    reduction: CellEncoding


def encode(genotype: Genotype, operations: Sequence[str], pairs: int) -> Encoding:
    """Encode a genotype whose cells have `pairs` pairs of these `operations`.

    Raises:
        ValueError: A cell has another number of pairs, or another operation.
    """
    return Encoding(
        _encode_cell("normal", genotype.normal, operations, pairs),
        _encode_cell("reduction", genotype.reduction, operations, pairs),
    )


def _encode_cell(kind: str, cell: Cell, operations: Sequence[str], pairs: int) -> CellEncoding:
    if len(cell.pairs) != pairs:
        raise ValueError(
            f"the {kind} cell has {len(cell.pairs)} pairs, but this interpreter's cells have "
            f"{pairs}; make an interpreter with `pairs={len(cell.pairs)}`"
        )
    slots = [element for pair in cell.pairs for element in pair]
    unknown = sorted({name for name, _ in slots} - set(operations))
    if unknown:
        raise ValueError(
            f"the {kind} cell has {', '.join(unknown)}, but this interpreter knows "
            f"{', '.join(operations)}; give all that are needed as `operations`"
        )
    padded = [*cell.concat, *[0] * (cell.states - len(cell.concat))]
    return CellEncoding(
        np.array([operations.index(name) for name, _ in slots], np.int32),
        np.array([state for _, state in slots], np.int32),
        Concat(np.array(padded, np.int32), np.int32(len(cell.concat))),
    )


def all_states(count: int) -> Concat:
    """Concatenate `count` states in their order."""
    return Concat(np.arange(count, dtype=np.int32), np.int32(count))
