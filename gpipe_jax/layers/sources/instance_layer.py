"""Describe a layer by an `nnx.Module` instance, whose values it starts with."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from gpipe_jax.layers import constants
from gpipe_jax.layers.constants import Constants
from gpipe_jax.layers.numeric_settings import cached_by_settings
from gpipe_jax.layers.sources.nnx_layer import KINDS, NnxLayer, Template, template
from gpipe_jax.utils.trees import PyTree, signature


@dataclass(frozen=True, eq=False)
class Structure:
    """Hold an instance without the values of its parameters and statistics.

    Equal structures make equal layers: they have the same graph, shapes and constants.
    """

    module: type[nnx.Module]
    graph: nnx.GraphDef
    shapes: nnx.State  # of all variables
    constants: Constants
    key: tuple  # the class, the shapes, and the digest of the constants

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (self.key, self.graph) == (other.key, other.graph)

    def __hash__(self) -> int:
        return hash(self.key)  # a graph need not be hashable: an attribute may be a list


class Values(NamedTuple):
    """Hold the values of an instance, as trees of numpy arrays."""

    params: PyTree
    stats: PyTree


class Origin(NamedTuple):
    """Hold where the parts of a layer are in a larger model."""

    model: Any
    paths: tuple[tuple[tuple, tuple], ...]  # (path in the layer's module, path in the model)

    def in_model(self, path: tuple) -> tuple:
        """Return the path in the model of what has a path in the layer's module."""
        for own, in_model in self.paths:
            if path[: len(own)] == own:
                return (*in_model, *path[len(own) :])
        raise KeyError(path)

    def name_in_model(self, path: str) -> str:
        """Return the name in the model of what has a path in the layer's module."""
        return ".".join(map(str, self.in_model(tuple(path.split(".")))))


@dataclass(frozen=True)
class InstanceLayer(NnxLayer):
    """Describe a layer by an instance; layers are equal if they differ in values only."""

    structure: Structure
    values: Values = field(compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def has_values(self) -> bool:
        return True

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        del key, x, extras
        return self.values.params

    def init_statistics(self) -> PyTree:
        return self.values.stats

    def name_in_model(self, path: str) -> str | None:
        return self.origin.name_in_model(path) if self.origin else None

    @property
    def template(self) -> Template:
        return _template(self.structure)

    def __str__(self) -> str:
        return self.linked(f"{self.structure.module.__name__}(...)")


def from_instance(module: nnx.Module, origin: Origin | None = None) -> InstanceLayer:
    """Describe a layer by a module with values; the module stays as it is."""
    copy = nnx.clone(module)
    own = constants.of_module(copy, *KINDS)
    own = own._replace(arrays=jax.tree.map(np.asarray, own.arrays))
    graph, state = nnx.split(copy)
    params, stats = (
        jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(copy, kind))) for kind in KINDS[:2]
    )
    shapes = jax.eval_shape(lambda: state)
    key = type(module), signature(nnx.to_pure_dict(shapes)), own.digest
    structure = Structure(type(module), graph, shapes, own, key)
    return InstanceLayer(structure, Values(params, stats), origin)


@cached_by_settings(maxsize=4096)
def _template(structure: Structure) -> Template:
    module = nnx.merge(structure.graph, structure.shapes)
    return template(module, structure.constants, structure.module.__name__)
