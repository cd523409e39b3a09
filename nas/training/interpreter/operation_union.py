"""Several layers of which one is chosen by a number, with parameters in one place for all.

That place is one flat vector as long as the largest layer's parameters, of which a layer uses a
prefix; likewise for statistics. One set of arrays for each layer would be twice as much, and so
would the optimizer's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.operations import OPERATIONS
from nas.training.interpreter.parameter_table import Entries, entries, is_entries


class Operation(nnx.Module):
    """One of `gpipe_jax.zoo.amoebanet.operations`, by name."""

    def __init__(
        self,
        name: str,
        in_features: int,
        features: int,
        stride: int,
        *,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        self.chosen = OPERATIONS[name](in_features, features, stride, norm=norm, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of x [B, H, W, in_features]."""
        return self.chosen(x)


def call(
    layer: Layer, parameters: PyTree, statistics: PyTree, x: PyTree, *, train: bool
) -> tuple[jax.Array, PyTree]:
    """A layer's output, and its running statistics after that."""
    context = Context(jax.random.key(0), train)  # none of these layers draws anything
    y, moments = layer.apply(parameters, statistics, x, context)
    return y, layer.commit(statistics, moments) if train else statistics


@dataclass(frozen=True)
class Union:
    """The layers to choose from. None is the choice of nothing, which has no parameters."""

    layers: tuple[Layer | None, ...]

    @functools.cached_property
    def shapes(self) -> list[tuple[PyTree, PyTree]]:
        """Of each layer's parameters and statistics."""
        return [({}, {}) if layer is None else layer.shapes(None) for layer in self.layers]

    @functools.cached_property
    def lengths(self) -> tuple[int, int]:
        """Of the vectors of parameters and of statistics."""
        parameters, statistics = zip(*self.shapes, strict=True)
        return max(map(_size, parameters)), max(map(_size, statistics))

    def call(
        self, i: int, parameters: jax.Array, statistics: jax.Array, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Layer i, which is not nothing, with its prefix of both vectors."""
        layer, (like_parameters, like_statistics) = self.layers[i], self.shapes[i]
        assert layer is not None
        p, s = unflatten(like_parameters, parameters), unflatten(like_statistics, statistics)
        y, s = call(layer, p, s, x, train=train)
        rest = statistics[_size(like_statistics) :]
        new = flatten(s, statistics.dtype).astype(statistics.dtype)
        return y, jnp.concatenate([new, rest])

    def tables(self) -> tuple[Entries, Entries]:
        """What the entries of both vectors are, for each layer: arrays [layers, length]."""
        names = [str(jax.tree.map(lambda a: a.shape, shapes)) for shapes in self.shapes]
        kinds = [names.index(name) for name in names]
        columns = zip(*self.shapes, strict=True)
        both = zip(columns, self.lengths, strict=True)
        parameters, statistics = (_table(shapes, kinds, length) for shapes, length in both)
        return parameters, statistics


def flatten(tree: PyTree, dtype: Any = jnp.float32) -> jax.Array:
    """All leaves one after the other."""
    return jnp.concatenate([jnp.zeros((0,), dtype), *map(jnp.ravel, jax.tree.leaves(tree))])


def unflatten(like: PyTree, vector: jax.Array) -> PyTree:
    """A tree with the shapes of `like` from a prefix of the vector."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [math.prod(a.shape) for a in leaves]
    ends = np.cumsum(sizes)
    parts = [
        vector[end - size : end].reshape(a.shape)
        for a, size, end in zip(leaves, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def _size(tree: PyTree) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


def _table(shapes: tuple[PyTree, ...], kinds: list[int], length: int) -> Entries:
    rows = [jax.tree.leaves(entries(tree), is_leaf=is_entries) for tree in shapes]

    def column(i: int) -> np.ndarray:
        filled = np.zeros((len(rows), length), np.float32)
        for row, leaves in zip(filled, rows, strict=True):
            values = np.concatenate([np.zeros(0), *(np.ravel(leaf[i]) for leaf in leaves)])
            row[: len(values)] = values
        return filled

    kind = np.repeat(np.array(kinds, np.float32)[:, None], length, 1)
    return Entries(column(0), column(1), column(2), kind)
