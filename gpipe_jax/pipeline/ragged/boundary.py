"""What crosses stage boundaries, in arrays whose shapes are the same for every boundary.

Boundaries keep their shape when all are alike; otherwise their leaves are laid end to end, by type,
and padded to the largest boundary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.utils.trees import PyTree, differentiable


class BoundaryFormat:
    """What crosses stage boundaries, as arrays whose shapes are the same for every boundary."""

    def __init__(self, boundaries: Sequence[PyTree]) -> None:
        leaves = [jax.tree.leaves(tree) for tree in boundaries]
        structures = {jax.tree.structure(tree) for tree in boundaries}
        self.packed = len(structures) > 1 or any(specs != leaves[0] for specs in leaves)
        dtypes = sorted({a.dtype for specs in leaves for a in specs}, key=str)
        widths = {d: max(_count(specs, d) for specs in leaves) for d in dtypes}
        self.shapes: list[jax.ShapeDtypeStruct] = (
            [jax.ShapeDtypeStruct((widths[d],), d) for d in dtypes]
            if self.packed
            else [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (leaves or [[]])[0]]
        )
        self.gradient_shapes = [a for a in self.shapes if differentiable(a)]

    def encode(self, leaves: Sequence[jax.Array], shapes: Sequence) -> list[jax.Array]:
        """Leaves of a boundary (or their gradients) as wire arrays of `shapes`."""
        if not self.packed:
            return list(leaves)
        return [pack([a for a in leaves if a.dtype == s.dtype], s, jnp) for s in shapes]

    def decode(self, arrays: Sequence[jax.Array], specs: Sequence) -> list[jax.Array]:
        """The inverse of `encode`, for leaves that look like `specs`."""
        if not self.packed:
            return list(arrays)
        flat = {a.dtype: a for a in arrays}
        used = dict.fromkeys(flat, 0)
        leaves = []
        for spec in specs:
            size = int(np.prod(spec.shape))
            start = used[spec.dtype]
            leaves.append(flat[spec.dtype][start : start + size].reshape(spec.shape))
            used[spec.dtype] += size
        return leaves


def _count(specs: Sequence, dtype: Any) -> int:
    return sum(int(np.prod(a.shape)) for a in specs if a.dtype == dtype)


def pack(arrays: Sequence, spec: Any, xp: Any) -> Any:
    """Arrays end to end, padded with zeros to `spec`; `xp` is numpy or jax.numpy."""
    flat = [xp.reshape(a, (-1,)) for a in arrays]
    rest = spec.shape[0] - sum(a.shape[0] for a in flat)
    return xp.concatenate([*flat, xp.zeros((rest,), spec.dtype)]) if flat else xp.zeros(*like(spec))


def like(spec: Any) -> tuple:
    """The shape and type to make an array like `spec`."""
    return spec.shape, spec.dtype
