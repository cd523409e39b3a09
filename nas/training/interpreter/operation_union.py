"""Choose one of several layers by a number, and store the parameters of any of them in one place.

The place is one flat vector, as long as the parameters of the largest layer. A layer uses a prefix
of it. The same holds for statistics:

    parameters of sep_3x3   |##################......|
    parameters of conv_1x1  |#######.................|     . unused
    parameters of identity  |........................|

Separate arrays for each layer would take about twice as much memory, and so would the optimizer's.
"""

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
from nas.training.interpreter.parameter_table import ParameterTable, is_table, layer_tables


class Operation(nnx.Module):
    """Apply one of `gpipe_jax.zoo.amoebanet.operations`, chosen by name."""

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
        """Apply the operation to x [B, H, W, in_features]."""
        return self.chosen(x)


def apply_layer(
    layer: Layer, parameters: PyTree, statistics: PyTree, x: PyTree, *, train: bool
) -> tuple[jax.Array, PyTree]:
    """Return the output of a layer and its new running statistics."""
    context = Context(jax.random.key(0), train)  # none of these layers draws random numbers
    y, moments = layer.apply(parameters, statistics, x, context)
    return y, layer.commit(statistics, moments) if train else statistics


@dataclass(frozen=True)
class OperationUnion:
    """Hold the layers to choose from. None stands for no layer, which has no parameters."""

    layers: tuple[Layer | None, ...]

    @property
    def shapes(self) -> list[tuple[PyTree, PyTree]]:
        """Return the shapes of each layer's parameters and statistics."""
        return [({}, {}) if layer is None else layer.shapes(None) for layer in self.layers]

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the lengths of the vectors of parameters and of statistics."""
        parameters, statistics = zip(*self.shapes, strict=True)
        return max(map(_size, parameters)), max(map(_size, statistics))

    def apply(
        self, i: int, parameters: jax.Array, statistics: jax.Array, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Apply layer i, which is not None, with its prefix of both vectors.

        Returns:
            The output, and the vector of statistics after this call.
        """
        layer, (parameter_shapes, statistics_shapes) = self.layers[i], self.shapes[i]
        assert layer is not None
        own_parameters = unflatten(parameter_shapes, parameters)
        own_statistics = unflatten(statistics_shapes, statistics)
        y, own_statistics = apply_layer(layer, own_parameters, own_statistics, x, train=train)
        padding = statistics[_size(statistics_shapes) :]
        prefix = flatten(own_statistics, statistics.dtype).astype(statistics.dtype)
        return y, jnp.concatenate([prefix, padding])

    def tables(self) -> tuple[ParameterTable, ParameterTable]:
        """Describe the elements of both vectors for each layer, in arrays [layers, length]."""
        names = [str(jax.tree.map(lambda a: a.shape, shapes)) for shapes in self.shapes]
        kinds = [names.index(name) for name in names]
        (parameters, statistics), lengths = zip(*self.shapes, strict=True), self.lengths
        return (
            _stacked_table(parameters, kinds, lengths[0]),
            _stacked_table(statistics, kinds, lengths[1]),
        )


def flatten(tree: PyTree, dtype: Any = jnp.float32) -> jax.Array:
    """Concatenate all leaves to a vector."""
    return jnp.concatenate([jnp.zeros((0,), dtype), *map(jnp.ravel, jax.tree.leaves(tree))])


def unflatten(shapes: PyTree, vector: jax.Array) -> PyTree:
    """Return a tree of arrays of these shapes from a prefix of the vector."""
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [math.prod(a.shape) for a in leaves]
    ends = np.cumsum(sizes)
    arrays = [
        vector[end - size : end].reshape(a.shape)
        for a, size, end in zip(leaves, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def _size(tree: PyTree) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


def _stacked_table(shapes: tuple[PyTree, ...], kinds: list[int], length: int) -> ParameterTable:
    """Return a table with a row for each layer, zero beyond the layer's own elements."""
    tables = [jax.tree.leaves(layer_tables(tree), is_leaf=is_table) for tree in shapes]

    def column(field: str) -> np.ndarray:
        filled = np.zeros((len(tables), length), np.float32)
        for row, leaves in zip(filled, tables, strict=True):
            arrays = [np.ravel(getattr(leaf, field)) for leaf in leaves]
            values = np.concatenate([np.zeros(0), *arrays])
            row[: len(values)] = values
        return filled

    kind = np.repeat(np.array(kinds, np.float32)[:, None], length, 1)
    return ParameterTable(column("spread"), column("start"), column("used"), kind)
