"""Build networks as the pipeline has them: layers of `zoo.amoebanet`, compiled one by one."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax import sequential
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.module_layer import ModuleLayer
from gpipe_jax.zoo.amoebanet.network import amoebanet
from nas.training.network import PyTree, Shape, Variables


@jax.tree_util.register_static
@dataclass(frozen=True)
class StaticArchitecture:
    """Hold an architecture that is part of the program: a pytree without leaves."""

    genotype: Genotype


@dataclass(frozen=True)
class Static:
    """Build a separate program for each architecture; parameters are tuples of the layers' trees.

    The trees are those of `gpipe_jax.sequential`, and so of checkpoints. With the key
    `fold_in(jax.random.key(seed), 0)` the initial values are those of a pipeline with that seed.
    """

    shape: Shape

    def encode(self, genotype: Genotype) -> StaticArchitecture:
        """Wrap a genotype.

        Raises:
            ValueError: There is no such network.
        """
        architecture = StaticArchitecture(genotype)
        self.layers(architecture)
        return architecture

    def layers(self, architecture: StaticArchitecture) -> list[Layer]:
        """Return the layers of the network: a stem, cells, and a classifier."""
        return _layers(self.shape, architecture.genotype)

    def init(self, architecture: StaticArchitecture, key: jax.Array) -> Variables:
        """Draw initial values."""
        layers = self.layers(architecture)
        parameters = [
            layer.init(jax.random.fold_in(key, i), None) for i, layer in enumerate(layers)
        ]
        return Variables(tuple(parameters), tuple(layer.init_statistics() for layer in layers))

    def apply(
        self,
        architecture: StaticArchitecture,
        values: Variables,
        images: jax.Array,
        *,
        train: bool,
    ) -> tuple[jax.Array, PyTree]:
        """Return scores [B, classes] of images [B, H, W, C], and the new statistics."""
        layers, (parameters, statistics) = self.layers(architecture), values
        key = jax.random.key(0)  # no layer of these networks draws random numbers
        scores, moments = sequential.forward(
            layers, parameters, statistics, images, key, train=train
        )
        if not train:
            return scores, statistics
        triples = zip(layers, statistics, moments, strict=True)
        return scores, tuple(layer.commit(old, new) for layer, old, new in triples)

    def used(self, architecture: StaticArchitecture) -> PyTree:
        """Return ones in the shapes of the parameters: there is no padding."""
        shapes = [layer.shapes(None)[0] for layer in self.layers(architecture)]
        return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), tuple(shapes))

    def inherit(
        self,
        child: StaticArchitecture,
        parent: StaticArchitecture,
        fresh: Variables,
        trained: Variables,
    ) -> Variables:
        """Return the parent's weights where slot and shape agree, else the fresh values.

        An operation agrees as a whole. A projection of concatenated states inherits the rows of the
        states that both concatenate.
        """
        readers = zip(self._concats_read(child), self._concats_read(parent), strict=True)
        values = zip(*fresh, strict=True), zip(*trained, strict=True)
        inherited = [
            _inherited(*pair, new, old) for pair, new, old in zip(readers, *values, strict=True)
        ]
        parameters, statistics = zip(*inherited, strict=True)
        return Variables(parameters, statistics)

    def _concats_read(self, architecture: StaticArchitecture) -> list["_Concats"]:
        """Return the concatenations that each layer makes and reads."""
        own = [_own_concat(layer) for layer in self.layers(architecture)]
        # Negative indices wrap around; the first two layers do not read so far back.
        return [_Concats(own[i], own[i - 1], own[i - 2]) for i in range(len(own))]


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


class _Concats(NamedTuple):
    """Hold the states that are concatenated by a layer and by the two layers before it."""

    own: tuple[int, ...]
    last: tuple[int, ...]
    before_last: tuple[int, ...]

    def piece_keys(self, path: tuple) -> list[tuple]:
        """Name the equal pieces of an array: one, or one for each state that a projection reads."""
        name, *rest = (key.key for key in path[1:])  # path[0]: parameters, or statistics
        if name == "outputs":
            return [(name, self.own[rest[0]], *rest[1:])]
        read_by = {"enter": self.last, "match": self.before_last, "linear": self.last}
        if name in read_by and rest[-1] in ("kernel", "even", "odd"):
            return [(name, *rest, state) for state in read_by[name]]
        return [(name, *rest)]

    def split(self, trees: PyTree) -> dict[tuple, jax.Array]:
        """Return all pieces of the trees' arrays by name."""
        pieces = {}
        for path, a in jax.tree.leaves_with_path(trees):
            keys = self.piece_keys(path)
            pieces |= zip(keys, jnp.split(a, len(keys), _input_axis(a)), strict=True)
        return pieces


def _own_concat(layer: Layer) -> tuple[int, ...]:
    """Return the states that a cell concatenates; the stem counts as one state."""
    assert isinstance(layer, ModuleLayer)
    cell = dict(layer.kwargs).get("cell")
    return cell.concat if cell else (0,)


def _inherited(ours: _Concats, theirs: _Concats, fresh: PyTree, trained: PyTree) -> PyTree:
    """Return (parameters, statistics) of a layer, piece by piece."""
    new, old = ours.split(fresh), theirs.split(trained)
    our_shapes, their_shapes = _shapes_by_unit(new), _shapes_by_unit(old)

    def choose(path: tuple, a: jax.Array) -> jax.Array:
        pieces = []
        for key in ours.piece_keys(path):
            agrees = our_shapes[_unit(key)] == their_shapes.get(_unit(key))
            pieces.append((old if agrees else new)[key])
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, _input_axis(a))

    return jax.tree.map_with_path(choose, fresh)


def _unit(key: tuple) -> tuple:
    """Name what a piece is inherited together with: all of an operation, or of an output."""
    return key[:2] if key[0] in ("operations", "outputs") else key


def _shapes_by_unit(pieces: dict[tuple, jax.Array]) -> dict[tuple, dict[tuple, Any]]:
    shapes: dict[tuple, dict[tuple, Any]] = {}
    for key, a in pieces.items():
        shapes.setdefault(_unit(key), {})[key] = a.shape
    return shapes


def _input_axis(a: jax.Array) -> int:
    """Return the axis of a kernel's inputs; of other arrays, the first axis."""
    return max(a.ndim - 2, 0)
