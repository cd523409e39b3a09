"""Networks as the pipeline has them: layers of `gpipe_jax.zoo.amoebanet.network`, compiled one by one."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax import sequential
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.layers.layer import Layer, ModuleLayer
from gpipe_jax.zoo.amoebanet.network import amoebanet
from nas.training.network import PyTree, Shape, Variables


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

    def init(self, architecture: Fixed, key: jax.Array) -> Variables:
        """Fresh values."""
        layers = self.layers(architecture)
        parameters = [a.init(jax.random.fold_in(key, i), None) for i, a in enumerate(layers)]
        return Variables(tuple(parameters), tuple(layer.init_statistics() for layer in layers))

    def apply(
        self, architecture: Fixed, values: Variables, images: jax.Array, *, train: bool
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

    def inherit(
        self, child: Fixed, parent: Fixed, fresh: Variables, trained: Variables
    ) -> Variables:
        """`fresh` values of a child, but its parent's `trained` ones where slot and shape agree.

        An operation agrees as a whole; a projection of concatenated states has the rows of those
        states that both concatenate.
        """
        outlines = zip(self._outlines(child), self._outlines(parent), strict=True)
        values = zip(*fresh, strict=True), zip(*trained, strict=True)
        found = [
            _inherited(*pair, new, old) for pair, new, old in zip(outlines, *values, strict=True)
        ]
        parameters, statistics = zip(*found, strict=True)
        return Variables(parameters, statistics)

    def _outlines(self, architecture: Fixed) -> list["_Outline"]:
        """Of the layers."""
        concats = [_concat(layer) for layer in self.layers(architecture)]
        # The two layers before each; the first two do not read so far back.
        return [_Outline(concats[i], concats[i - 1], concats[i - 2]) for i in range(len(concats))]


@functools.lru_cache(maxsize=256)
def _layers(shape: Shape, genotype: Genotype) -> list[Layer]:
    return amoebanet(
        genotype,
        layers=3 * shape.cells_per_stack,
        filters=shape.filters,
        image=shape.image,
        classes=shape.classes,
        stem=shape.stem,
        in_channels=shape.channels,
        batch_norm_momentum=shape.batch_norm_momentum,
        dtype=shape.dtype,
    )


# --- inheritance ----------------------------------------------------------------------------------


class _Outline(NamedTuple):
    """Of a layer: which states are concatenated by it, by the last layer, by the one before."""

    own: tuple[int, ...]
    last: tuple[int, ...]
    before: tuple[int, ...]

    def keys(self, path: tuple) -> list[tuple]:
        """The names of a leaf's equal parts: of one, or of as many as there are states to read."""
        name, *rest = (key.key for key in path[1:])  # path[0]: parameters, or statistics
        if name == "outputs":
            return [(name, self.own[rest[0]], *rest[1:])]
        reads = {"enter": self.last, "match": self.before, "linear": self.last}
        if name in reads and rest[-1] in ("kernel", "even", "odd"):
            return [(name, *rest, state) for state in reads[name]]
        return [(name, *rest)]

    def parts(self, trees: PyTree) -> dict[tuple, jax.Array]:
        """What is in the trees by such names."""
        leaves = [(self.keys(path), a) for path, a in jax.tree.leaves_with_path(trees)]
        return {
            key: part
            for keys, a in leaves
            for key, part in zip(keys, jnp.split(a, len(keys), _rows(a)), strict=True)
        }


def _concat(layer: Layer) -> tuple[int, ...]:
    """The states that a cell concatenates; of the stem's output there is no more than one."""
    assert isinstance(layer, ModuleLayer)
    cell = dict(layer.kwargs).get("cell")
    return cell.concat if cell else (0,)


def _inherited(ours: _Outline, theirs: _Outline, fresh: PyTree, trained: PyTree) -> PyTree:
    """(parameters, statistics) of a layer, part by part."""
    new, old = ours.parts(fresh), theirs.parts(trained)
    mine, others = _shapes(new), _shapes(old)

    def one(path: tuple, a: jax.Array) -> jax.Array:
        keys = ours.keys(path)
        agree = [mine[_whole(key)] == others.get(_whole(key)) for key in keys]
        found = [(old if same else new)[key] for key, same in zip(keys, agree, strict=True)]
        return found[0] if len(found) == 1 else jnp.concatenate(found, _rows(a))

    return jax.tree.map_with_path(one, fresh)


def _whole(key: tuple) -> tuple:
    """What a part is inherited with: all of an operation, or of an output."""
    return key[:2] if key[0] in ("operations", "outputs") else key


def _shapes(parts: dict[tuple, jax.Array]) -> dict[tuple, dict[tuple, Any]]:
    """Of all that is inherited together."""
    found: dict[tuple, dict[tuple, Any]] = {}
    for key, a in parts.items():
        found.setdefault(_whole(key), {})[key] = a.shape
    return found


def _rows(a: jax.Array) -> int:
    """The axis of a kernel's inputs; of what is no kernel, the first."""
    return max(a.ndim - 2, 0)
