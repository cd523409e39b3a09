"""Divide a Linen model with its values, which is bound to them, into layers."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen
from flax.core import unfreeze

from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.layers.sources.arguments import check_hashable, takes
from gpipe_jax.layers.sources.blocks import Piece
from gpipe_jax.layers.sources.instance_layer import Origin, Values
from gpipe_jax.layers.sources.linen_layer import LinenLayer, hashable
from gpipe_jax.utils.trees import PyTree, describe, same_shapes


class LinenParts(linen.Module):
    """Apply a function to parts of a model: the code between its blocks."""

    function: Callable
    parts: tuple[linen.Module, ...]

    def __call__(
        self, x: PyTree, *, train: bool, deterministic: bool, progress: Any = 1.0, **extras: PyTree
    ) -> PyTree:
        options = {"train": train, "deterministic": deterministic, "progress": progress}
        taken = {name: value for name, value in options.items() if takes(self.function, name)}
        return self.function(*self.parts, x, **taken, **extras)


@dataclass(frozen=True)
class BoundLinenLayer(LinenLayer):
    """Describe a layer by a Linen module and its values; layers are equal if only these differ.

    Variables beside "params", as the statistics of a batch norm, are constants.
    """

    digest: str  # of the constants
    constants: PyTree = field(compare=False, repr=False)
    values: Values = field(compare=False, repr=False)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def has_values(self) -> bool:
        return True

    def name_in_model(self, path: str) -> str | None:
        return self.origin.name_in_model(path) if self.origin else None

    def init_constants(self) -> PyTree:
        return self.constants

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        made = jax.eval_shape(lambda: self._variables(key, x, **extras))
        own = {"params": self.values.params, **self.constants}
        fresh = {name: made.get(name, {}) for name in own}
        if same_shapes(fresh, own):
            return self.values.params
        if jax.tree.structure(fresh) == jax.tree.structure(own):
            raise ValueError(f"its values are {describe(own)}, but must be {describe(fresh)}")
        raise UnfitModuleError(
            f"{self} has other parameters than its values: it shares a module with another part of "
            f"its model, or is bound to variables of another; name the parts that it uses beside a "
            f'function, as ("norm", "embed", function)'
        )


def from_bound(module: linen.Module, origin: Origin | None = None) -> BoundLinenLayer:
    """Describe a layer by a Linen module that is bound to its variables."""
    alone, variables = _unbound(module)
    return _layer(alone, variables, origin)


def from_piece(model: linen.Module, piece: Piece) -> BoundLinenLayer:
    """Describe a layer by parts of a bound model."""
    modules = [named.module for named in piece.parts]
    if piece.function is None:
        [module] = modules
        return from_bound(module, Origin(model, (((), module.path),)))
    unbound = [_unbound(module) for module in modules]
    collections: dict[str, dict] = {}
    for i, (_, variables) in enumerate(unbound):
        for collection, tree in variables.items():
            collections.setdefault(collection, {})[f"parts_{i}"] = tree  # as Linen names them
    paths = tuple(((f"parts_{i}",), module.path) for i, module in enumerate(modules))
    parts = LinenParts(piece.function, tuple(part for part, _ in unbound))
    return _layer(parts, collections, Origin(model, paths))


def _unbound(module: linen.Module) -> tuple[linen.Module, dict[str, PyTree]]:
    """Return a module on its own, and its variables."""
    alone, variables = module.unbind()
    arrays = jax.tree.map(np.asarray, unfreeze(dict(variables)))
    return hashable(alone.clone(name=None)), {name: tree for name, tree in arrays.items() if tree}


def _layer(
    module: linen.Module, variables: dict[str, PyTree], origin: Origin | None
) -> BoundLinenLayer:
    constants = {name: tree for name, tree in variables.items() if name != "params"}
    values = Values(variables.get("params", {}), {})
    digest = hashlib.sha256(repr(jax.tree.structure(constants)).encode())
    for a in jax.tree.leaves(constants):
        digest.update(f"{a.dtype}{a.shape}".encode() + a.tobytes())
    layer = BoundLinenLayer(module, digest.hexdigest(), constants, values, origin)
    check_hashable(layer)
    return layer


def with_values(model: linen.Module, values: Mapping[tuple, jax.Array]) -> linen.Module:
    """Return a bound model with other values of some of its parameters, by path."""
    alone, variables = model.unbind()
    variables = unfreeze(dict(variables))  # a copy of its dicts
    for path, value in values.items():
        tree = variables["params"]
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value
    return alone.bind(variables)
