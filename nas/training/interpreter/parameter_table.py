"""What each number of a network is: how it starts, and whether the architecture has it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.utils.trees import PyTree

_CUT = 0.87962566103423978  # standard deviation of a normal distribution that is cut at 2


class Entries(NamedTuple):
    """Of an array of numbers, each in its shape: it starts as start + spread * normal, cut at 2."""

    spread: Any
    start: Any
    used: Any  # 1 or 0
    kind: Any  # of the layer it belongs to: parameters of equal kinds have equal shapes

    def masked(self, mask: Any) -> "Entries":
        """Used only where the mask, of the leading axes, says so; zero elsewhere."""

        def one(a: Any) -> jax.Array:
            wide = jnp.asarray(mask, jnp.float32)
            return a * wide.reshape(wide.shape + (1,) * (a.ndim - wide.ndim))

        return self._replace(spread=one(self.spread), start=one(self.start), used=one(self.used))


def is_entries(tree: PyTree) -> bool:
    """Whether it is a leaf of a tree of these."""
    return isinstance(tree, Entries)


def masked(tree: PyTree, mask: Any) -> PyTree:
    """`Entries.masked` of them all."""
    return jax.tree.map(lambda e: e.masked(mask), tree, is_leaf=is_entries)


def entries(shapes: PyTree) -> PyTree:
    """Those of a layer's parameters or statistics, by the names that layers give them."""

    def one(path: tuple, a: Any) -> Entries:
        spread, start = _distribution(path[-1].key, a.shape)
        full = lambda value: np.full(a.shape, value, np.float32)  # noqa: E731
        return Entries(full(spread), full(start), full(1), full(0))

    return jax.tree.map_with_path(one, shapes)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(spread, start), as `gpipe_jax.zoo.amoebanet.conv_norm.INIT` and `nnx.BatchNorm` have it."""
    if name in ("bias", "mean"):
        return 0.0, 0.0
    if name in ("scale", "var"):
        return 0.0, 1.0
    *window, _, features = (*shape, 1) if name == "depthwise" else shape
    return math.sqrt(2 / (math.prod(window) * features)) / _CUT, 0.0


def draw(tree: PyTree, key: jax.Array) -> PyTree:
    """Numbers with these starts. One draw for all: for each array one would compile for long."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_entries)
    sizes = [math.prod(jnp.shape(e.used)) for e in leaves]
    noise = jax.random.truncated_normal(key, -2, 2, (sum(sizes),), jnp.float32)
    parts = jnp.split(noise, np.cumsum(sizes)[:-1])
    found = [
        e.start + e.spread * part.reshape(jnp.shape(e.used))
        for e, part in zip(leaves, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def starts(tree: PyTree) -> PyTree:
    """Numbers that all start at a fixed value."""
    return jax.tree.map(lambda e: jnp.asarray(e.start), tree, is_leaf=is_entries)


def used(tree: PyTree) -> PyTree:
    """1 for each number that the architecture has, else 0."""
    return jax.tree.map(lambda e: jnp.asarray(e.used), tree, is_leaf=is_entries)


def both(ours: PyTree, theirs: PyTree) -> PyTree:
    """Whether two architectures both have a number, as part of layers of the same kind."""

    def one(a: Entries, b: Entries) -> jax.Array:
        return (jnp.asarray(a.used) * b.used > 0) & (jnp.asarray(a.kind) == b.kind)

    return jax.tree.map(one, ours, theirs, is_leaf=is_entries)
