"""Describe every element of a network's arrays: its initial value, and whether it is used.

The arrays have the same shapes for all architectures, so each architecture leaves some elements
unused: padding.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.utils.trees import PyTree

_CUT_DEVIATION = 0.87962566103423978
"""Standard deviation of a standard normal distribution that is cut at 2 (and -2)."""


class ParameterTable(NamedTuple):
    """Describe an array of parameters or statistics, with one number per element in each field.

    The initial value of an element is start + spread * (a standard normal draw, cut at 2).
    """

    spread: Any
    start: Any
    used: Any  # 1 or 0
    kind: Any  # of the element's layer: layers of equal kinds have parameters of equal shapes

    def masked(self, mask: Any) -> "ParameterTable":
        """Return the table with the elements outside the mask unused and initially zero.

        The mask covers the leading axes.
        """

        def apply(a: Any) -> jax.Array:
            wide = jnp.asarray(mask, jnp.float32)
            return a * wide.reshape(wide.shape + (1,) * (a.ndim - wide.ndim))

        return self._replace(
            spread=apply(self.spread), start=apply(self.start), used=apply(self.used)
        )


def is_table(tree: PyTree) -> bool:
    """Return whether this is a leaf of a tree of tables."""
    return isinstance(tree, ParameterTable)


def masked(tables: PyTree, mask: Any) -> PyTree:
    """Apply `ParameterTable.masked` to every table of a tree."""
    return jax.tree.map(lambda table: table.masked(mask), tables, is_leaf=is_table)


def layer_tables(shapes: PyTree) -> PyTree:
    """Return the tables of a layer's parameters or statistics, all of which are used.

    The name of each array, as the layers give it, decides its initial values.
    """

    def table(path: tuple, a: Any) -> ParameterTable:
        def full(value: float) -> np.ndarray:
            return np.full(a.shape, value, np.float32)

        spread, start = _distribution(path[-1].key, a.shape)
        return ParameterTable(full(spread), full(start), full(1), full(0))

    return jax.tree.map_with_path(table, shapes)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return (spread, start), as in `zoo.amoebanet.conv_norm.INIT` and `nnx.BatchNorm`."""
    if name in ("bias", "mean"):
        return 0.0, 0.0
    if name in ("scale", "var"):
        return 0.0, 1.0
    *window, _, features = (*shape, 1) if name == "depthwise" else shape
    return math.sqrt(2 / (math.prod(window) * features)) / _CUT_DEVIATION, 0.0


def draw(tables: PyTree, key: jax.Array) -> PyTree:
    """Draw initial values.

    All arrays share one draw, because one draw for each would take long to compile.
    """
    leaves, structure = jax.tree.flatten(tables, is_leaf=is_table)
    sizes = [math.prod(jnp.shape(table.used)) for table in leaves]
    noise = jax.random.truncated_normal(key, -2, 2, (sum(sizes),), jnp.float32)
    noises = jnp.split(noise, np.cumsum(sizes)[:-1])
    arrays = [
        table.start + table.spread * noise.reshape(jnp.shape(table.used))
        for table, noise in zip(leaves, noises, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def starts(tables: PyTree) -> PyTree:
    """Return the initial values without any spread."""
    return jax.tree.map(lambda table: jnp.asarray(table.start), tables, is_leaf=is_table)


def used(tables: PyTree) -> PyTree:
    """Return 1 for each element that the architecture uses, else 0."""
    return jax.tree.map(lambda table: jnp.asarray(table.used), tables, is_leaf=is_table)


def shared(ours: PyTree, theirs: PyTree) -> PyTree:
    """Return which elements two architectures both use, in layers of the same kind."""

    def compare(a: ParameterTable, b: ParameterTable) -> jax.Array:
        return (jnp.asarray(a.used) * b.used > 0) & (jnp.asarray(a.kind) == b.kind)

    return jax.tree.map(compare, ours, theirs, is_leaf=is_table)
