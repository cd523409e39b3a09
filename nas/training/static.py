"""Networks as the pipeline has them: layers of `gpipe_jax.zoo.amoebanet`, compiled one by one."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpipe_jax import sequential
from gpipe_jax.genotype import Genotype
from gpipe_jax.layers.layer import Layer
from gpipe_jax.zoo.amoebanet import amoebanet
from nas.training.network import PyTree, Shape, Values


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fixed:
    """An architecture that is part of the program: a pytree without leaves."""

    genotype: Genotype


@dataclass(frozen=True)
class Static:
    """Each architecture a program of its own; parameters are tuples of the layers' trees.

    These are the trees of `gpipe_jax.sequential`, and so of checkpoints: with the key
    `fold_in(jax.random.key(seed), 0)` they start as in a pipeline of that seed.
    """

    shape: Shape

    def encode(self, genotype: Genotype) -> Fixed:
        """The genotype itself; ValueError if there is no such network."""
        self.layers(Fixed(genotype))
        return Fixed(genotype)

    def layers(self, architecture: Fixed) -> list[Layer]:
        """The layers of the network: a stem, cells, and a classifier."""
        return _layers(self.shape, architecture.genotype)

    def init(self, architecture: Fixed, key: jax.Array) -> Values:
        """Fresh values."""
        layers = self.layers(architecture)
        parameters = [a.init(jax.random.fold_in(key, i), None) for i, a in enumerate(layers)]
        return Values(tuple(parameters), tuple(layer.init_statistics() for layer in layers))

    def apply(
        self, architecture: Fixed, values: Values, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Scores [B, classes] of images [B, H, W, C], and the statistics after this call."""
        layers, (parameters, statistics) = self.layers(architecture), values
        # No layer of these networks draws anything.
        key = jax.random.key(0)
        scores, moments = sequential.forward(
            layers, parameters, statistics, images, key, train=train
        )
        if not train:
            return scores, statistics
        triples = zip(layers, statistics, moments, strict=True)
        return scores, tuple(layer.commit(s, m) for layer, s, m in triples)

    def used(self, architecture: Fixed) -> PyTree:
        """Like the parameters: all ones."""
        shapes = [layer.shapes(None)[0] for layer in self.layers(architecture)]
        return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tuple(shapes))

    def inherit(self, child: Fixed, parent: Fixed, fresh: Values, trained: Values) -> Values:
        """`fresh` values of a child, but its parent's `trained` ones where slot and shape agree."""
        del child, parent
        return Values(*(_agreeing(a, b) for a, b in zip(fresh, trained, strict=True)))


@functools.lru_cache(maxsize=256)
def _layers(shape: Shape, genotype: Genotype) -> list[Layer]:
    return amoebanet(
        genotype,
        layers=3 * shape.cells,
        filters=shape.filters,
        image=shape.image,
        classes=shape.classes,
        stem=shape.stem,
        in_channels=shape.channels,
        batch_norm_momentum=shape.batch_norm_momentum,
        dtype=shape.dtype,
    )


def _agreeing(fresh: PyTree, trained: PyTree) -> PyTree:
    """`fresh`, with the leaves of `trained` that have the same path and shape."""
    found = dict(jax.tree_util.tree_leaves_with_path(trained))

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        old = found.get(path)
        return leaf if old is None or old.shape != leaf.shape else old

    return jax.tree.map_with_path(one, fresh)
