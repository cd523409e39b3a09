"""Encode the boundaries between stages in arrays whose shapes are the same for every boundary.

If all boundaries have the same shapes, they keep them. Otherwise the leaves of each dtype are laid
end to end, and padded with zeros to the largest boundary:

    boundary 0   x [2, 3], skip [4]    ->  | x x x x x x | s s s s | 0 0 |
    boundary 1   x [2, 6]              ->  | x x x x x x x x x x x x     |
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.utils.trees import PyTree, describe, differentiable, same_shapes


class BoundaryFormat:
    """Describe the arrays that pass between stages.

    Args:
        boundaries: The trees of shapes that pass between the stages, in order.

    Attributes:
        packed: Whether boundaries differ, so that their leaves are laid end to end.
        shapes: The shapes of an encoded boundary.
        gradient_shapes: The shapes of an encoded gradient: only floating-point arrays have one.
    """

    def __init__(self, boundaries: Sequence[PyTree]) -> None:
        leaves = [jax.tree.leaves(tree) for tree in boundaries]
        structures = {jax.tree.structure(tree) for tree in boundaries}
        self.packed = len(structures) > 1 or any(specs != leaves[0] for specs in leaves)
        if self.packed:
            dtypes = sorted({a.dtype for specs in leaves for a in specs}, key=str)
            widths = [max(_count(specs, dtype) for specs in leaves) for dtype in dtypes]
            self.shapes = [
                jax.ShapeDtypeStruct((width,), dtype)
                for width, dtype in zip(widths, dtypes, strict=True)
            ]
        else:
            first = leaves[0] if leaves else []
            self.shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in first]
        self.gradient_shapes = [a for a in self.shapes if differentiable(a)]

    def encode(
        self, leaves: Sequence[jax.Array], specs: Sequence, shapes: Sequence
    ) -> list[jax.Array]:
        """Encode the leaves of a boundary, or their gradients, in arrays of `shapes`.

        Raises ValueError unless the leaves have the shapes and types of `specs`, with which
        `decode` reads them.
        """
        if not same_shapes(list(leaves), list(specs)):
            raise ValueError(
                f"a stage sends {describe(list(leaves))}, but the next one takes "
                f"{describe(list(specs))}; a layer must return the shapes and types that were "
                f"inferred for it when the pipeline was built"
            )
        if not self.packed:
            return list(leaves)
        return [pack([a for a in leaves if a.dtype == s.dtype], s, jnp) for s in shapes]

    def decode(self, arrays: Sequence[jax.Array], specs: Sequence) -> list[jax.Array]:
        """Invert `encode`: return leaves with the shapes and dtypes of `specs`."""
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
    """Return the number of elements of a dtype."""
    return sum(int(np.prod(a.shape)) for a in specs if a.dtype == dtype)


def pack(arrays: Sequence, spec: Any, xp: Any) -> Any:
    """Lay arrays end to end, padded with zeros to `spec`; `xp` is numpy or jax.numpy."""
    if not arrays:
        return zeros(spec, xp)
    flat = [xp.reshape(a, (-1,)) for a in arrays]
    padding = spec.shape[0] - sum(a.shape[0] for a in flat)
    return xp.concatenate([*flat, xp.zeros((padding,), spec.dtype)])


def zeros(spec: Any, xp: Any) -> Any:
    """Return an array of zeros with the shape and dtype of `spec`."""
    return xp.zeros(spec.shape, spec.dtype)
