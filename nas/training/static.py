"""Networks as the pipeline has them: layers of `gpipe_jax.zoo.amoebanet`, compiled one by one."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax import sequential
from gpipe_jax.genotype import Genotype
from gpipe_jax.layers.layer import Layer, ModuleLayer
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
        """`fresh` values of a child, but its parent's `trained` ones where slot and shape agree.

        A projection of concatenated states agrees if they are equally many.
        """
        layers = zip(self.layers(child), self.layers(parent), strict=True)
        found = [
            _inherited(*pair, *trees)
            for pair, *trees in zip(
                layers, zip(*fresh, strict=True), zip(*trained, strict=True), strict=True
            )
        ]
        parameters, statistics = zip(*found, strict=True)
        return Values(parameters, statistics)


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


def _inherited(child: Layer, parent: Layer, fresh: PyTree, trained: PyTree) -> PyTree:
    """(parameters, statistics) of a layer, part by part."""
    new, old = (
        [_parts(layer, tree) for tree in pair]
        for layer, pair in ((child, fresh), (parent, trained))
    )
    agreeing = {key for key, part in new[0].items() if _shapes(part) == _shapes(old[0].get(key))}
    return tuple(
        _joined(child, {key: (theirs if key in agreeing else ours)[key] for key in ours}, tree)
        for ours, theirs, tree in zip(new, old, fresh, strict=True)
    )


def _parts(layer: Layer, tree: PyTree) -> dict[Any, PyTree]:
    """What is inherited as a whole: a cell's operations by slot, its outputs by state, the rest."""
    parts: dict[Any, PyTree] = {}
    for name, part in tree.items():
        several = name in ("operations", "outputs")
        parts |= {_key(layer, name, i): a for i, a in part.items()} if several else {name: part}
    return parts


def _joined(layer: Layer, parts: dict[Any, PyTree], like: PyTree) -> PyTree:
    """The tree with these parts."""

    def one(name: str, part: PyTree) -> PyTree:
        if name in ("operations", "outputs"):
            return {i: parts[_key(layer, name, i)] for i in part}
        return parts[name]

    return {name: one(name, part) for name, part in like.items()}


def _key(layer: Layer, name: str, i: int) -> tuple[str, int]:
    assert isinstance(layer, ModuleLayer)
    return name, dict(layer.kwargs)["cell"].concat[i] if name == "outputs" else i


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, tree)
