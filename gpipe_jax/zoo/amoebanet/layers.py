"""Implement the layers of an AmoebaNet: stem, cell, auxiliary head, classifier.

    x -> Stem -> x -> first cell -> (x, skip) -> cell -> (x, skip) -> ... -> Classifier -> scores

From the first cell on, the boundary between two layers is (x, skip): the outputs of the last cell
and of the one before it.

Letters: B images, H and W height and width, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.genotypes.genotype import INPUTS, Cell
from gpipe_jax.layers.pooling import avg_pool
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import INIT, ConvNorm, Identity, Normalization, match
from gpipe_jax.zoo.amoebanet.operations import OPERATIONS

CellBoundary = tuple[jax.Array, jax.Array]  # (x, skip)

AUXILIARY_WIDTHS = (51, 307)
"""Widths of the auxiliary head: 0.4 times NASNet's 128 and 768, as in AmoebaNet's code."""

POOL, POOL_STRIDE = 5, 3
"""Window and stride of the auxiliary head's average pool, which has no padding."""


class Stem(nnx.Module):
    """Map images to features in `dtype` by a 3x3 convolution and batch norm."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int,
        padding: str,
        norm: Normalization,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = ConvNorm(
            in_features,
            features,
            size=(3, 3),
            stride=stride,
            padding=padding,
            relu=False,
            norm=norm,
            rngs=rngs,
        )
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.astype(self.dtype))


class DropPath(nnx.Module):
    """Set x to zero for some examples in training, and scale up the others.

    The probability is `rate` times the progress of training (ScheduledDropPath, NASNet,
    https://arxiv.org/abs/1707.07012).
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.deterministic = rate, False

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs, progress: jax.Array | float) -> jax.Array:
        if self.rate == 0 or self.deterministic:
            return x
        keep = 1 - self.rate * jnp.asarray(progress, jnp.float32)
        kept = jax.random.bernoulli(rngs.dropout(), keep, (x.shape[0], 1, 1, 1))
        return jnp.where(kept, x / keep.astype(x.dtype), 0)


class AmoebaCell(nnx.Module):
    """Apply a cell: map (x, skip) to (y, x), where y is the concatenation of some states.

    State 0 is x after relu, 1x1 convolution and batch norm. State 1 is skip, matched to the width
    of state 0 and, with `skip_stride` 2, to its resolution. Each further state is the sum of two
    operations on earlier states. Only operations on states 0 and 1 have the cell's stride.

    The first cell has no `skip_features`. It takes the stem's x alone, as x and as skip.
    """

    def __init__(
        self,
        cell: Cell,
        features: int,
        in_features: int,
        skip_features: int | None,
        *,
        stride: int = 1,
        skip_stride: int = 1,
        drop_path: float = 0.0,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        self.cell, self.first, self.stride = cell, skip_features is None, stride
        widths, options = [features] * cell.states, {"norm": norm, "rngs": rngs}
        self.enter = ConvNorm(in_features, features, **options)
        if skip_features is None:
            self.match, widths[1] = Identity(), in_features
        else:
            self.match = match(skip_features, features, skip_stride, relu=True, **options)

        def shape_for(state: int) -> tuple[int, int, int]:
            """Return the widths before and after an operation on a state, and its stride."""
            return widths[state], features, stride if state < INPUTS else 1

        elements = [element for pair in cell.pairs for element in pair]
        self.operations = nnx.List(
            [OPERATIONS[name](*shape_for(i), **options) for name, i in elements]
        )
        self.outputs = nnx.List([match(*shape_for(i), relu=False, **options) for i in cell.concat])
        self.drop_path = DropPath(drop_path)

    def __call__(
        self, inputs: PyTree, *, rngs: nnx.Rngs, progress: jax.Array | float
    ) -> tuple[jax.Array, jax.Array]:
        x, skip = (inputs, inputs) if self.first else inputs
        if self.stride > 1 and min(x.shape[1:3]) < 2:
            raise ValueError(
                f"a cell that halves its features needs 2x2 of them, got "
                f"{x.shape[1]}x{x.shape[2]}; give larger images, or fewer reductions"
            )
        states, operations = [self.enter(x), self.match(skip)], iter(self.operations)

        def element(name: str, state: int) -> jax.Array:
            y = next(operations)(states[state])
            return y if name == "identity" else self.drop_path(y, rngs=rngs, progress=progress)

        for a, b in self.cell.pairs:
            states.append(element(*a) + element(*b))
        outputs = [out(states[i]) for out, i in zip(self.outputs, self.cell.concat, strict=True)]
        return jnp.concatenate(outputs, -1), x


class AuxiliaryHead(nnx.Module):
    """Map (x, skip) to ((x, skip), scores [B, classes]), for x of H = W = `size`.

    Its loss helps to train the layers before it (Szegedy et al. 2015).
    """

    def __init__(
        self, in_features: int, size: int, classes: int, *, norm: Normalization, rngs: nnx.Rngs
    ) -> None:
        narrow, wide = AUXILIARY_WIDTHS
        self.size = size
        pooled = (size - POOL) // POOL_STRIDE + 1
        options = {"norm": norm, "rngs": rngs}
        self.project = ConvNorm(in_features, narrow, relu=False, **options)
        self.whole = ConvNorm(narrow, wide, size=(pooled, pooled), padding="VALID", **options)
        self.linear = nnx.Linear(wide, classes, kernel_init=INIT, rngs=rngs)

    def __call__(self, boundary: CellBoundary) -> tuple[CellBoundary, jax.Array]:
        if boundary[0].shape[1:3] != (self.size, self.size):
            raise ValueError(
                f"the auxiliary head expects features of {self.size}x{self.size}, got "
                f"{boundary[0].shape[1]}x{boundary[0].shape[2]}; set `image` to the images' size"
            )
        y = avg_pool(jax.nn.relu(boundary[0]), POOL, POOL_STRIDE, "VALID")
        y = jax.nn.relu(self.whole(self.project(y)))
        return boundary, self.linear(y[:, 0, 0])


class Classifier(nnx.Module):
    """Map (x, skip) to scores [B, classes]: relu, mean over positions, dropout, linear map.

    With `auxiliary`, map ((x, skip), auxiliary scores) to (scores, auxiliary scores).
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        dropout: float = 0.0,
        auxiliary: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.dropout = nnx.Dropout(dropout)
        self.linear = nnx.Linear(in_features, classes, kernel_init=INIT, rngs=rngs)
        self.auxiliary = auxiliary

    def __call__(self, inputs: PyTree, *, rngs: nnx.Rngs) -> PyTree:
        (x, _), *popped = inputs if self.auxiliary else (inputs,)
        y = self.dropout(jax.nn.relu(x).mean((1, 2)), rngs=rngs)
        scores = self.linear(y)
        return (scores, *popped) if self.auxiliary else scores
