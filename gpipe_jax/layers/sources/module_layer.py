"""Describe a layer by the class of an `nnx.Module`, which is built under tracing."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from gpipe_jax.layers import constants
from gpipe_jax.layers.constants import Constants
from gpipe_jax.layers.numeric_settings import cached_by_settings
from gpipe_jax.layers.sources.arguments import brief, takes
from gpipe_jax.layers.sources.nnx_layer import KINDS, NnxLayer, Template, template
from gpipe_jax.utils.trees import PyTree


@dataclass(frozen=True)
class ModuleLayer(NnxLayer):
    """Describe a layer by an `nnx.Module` class and the arguments to build it with."""

    module: type[nnx.Module]
    kwargs: tuple[tuple[str, Any], ...]
    types: tuple  # of the arguments: layers with arguments 1 and True differ

    def build(self, key: jax.Array) -> nnx.Module:
        """Build the module, with all its parameters."""
        rngs = {"rngs": nnx.Rngs(key)} if takes(self.module.__init__, "rngs") else {}
        return self.module(**dict(self.kwargs), **rngs)

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        del x, extras  # nnx modules know the shape of their input
        module = self.build(key)
        constants.take(module)
        return nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[1])

    @property
    def template(self) -> Template:
        return _template(self)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={brief(value)}" for name, value in self.kwargs)
        return self.linked(f"{self.module.__name__}({arguments})")


@cached_by_settings(maxsize=4096)
def _template(description: ModuleLayer) -> Template:
    """Build the module abstractly, without any array but constants, and split it."""
    own: list[Constants] = []

    def build() -> nnx.Module:
        module = description.build(jax.random.key(0))
        own.append(constants.of_module(module, *KINDS))
        return module

    def build_constants(key: jax.Array) -> Constants:
        return constants.of_module(description.build(key), *KINDS)

    module, name = nnx.eval_shape(build), str(description)
    values = constants.compute(build_constants, name) if own[0].places else own[0]
    return template(module, values, name)
