"""Describe a layer by a Linen module."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen
from flax.errors import ModifyScopeVariableError

from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.sources.arguments import takes
from gpipe_jax.utils.trees import PyTree

_OF_LINEN = ("parent", "name")  # fields of every module


@dataclass(frozen=True)
class LinenLayer(Layer):
    """Describe a layer by a Linen module; its only variables are parameters."""

    module: linen.Module

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        variables = self._variables(key, x, **extras)
        others = sorted(set(variables) - {"params"})
        if others:
            raise UnfitModuleError(
                f"{self} has variables {', '.join(map(repr, others))} beside 'params', which a "
                f"pipeline does not update; for batch norm use an nnx module with nnx.BatchNorm, "
                f"or keep them as they are by layer(module.bind(variables))"
            )
        return dict(variables.get("params", {}))

    def _variables(self, key: jax.Array, x: PyTree, **extras: PyTree) -> dict[str, Any]:
        """Make all variables of the module."""
        options = {**self._options(train=False), **extras}
        return dict(self.module.init({"params": key}, x, **options))

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        del stats
        options = {**self._options(context.train, progress=context.progress), **context.extras}
        constants = self.init_constants() if context.constants is None else context.constants
        variables = {"params": params, **constants}
        try:
            # Linen draws from "params" whatever stream a module asks for and was not given.
            y = self.module.apply(variables, x, rngs={"params": context.key}, **options)
        except ModifyScopeVariableError as error:
            raise UnfitModuleError(
                f"{self} changes its {', '.join(map(repr, constants))} in a call, but a pipeline "
                f"does not update what a Linen module has beside 'params'; give batch norms "
                f"use_running_average=True, or use an nnx module with nnx.BatchNorm"
            ) from error
        return y, {}

    def _options(self, train: bool, **others: Any) -> dict[str, Any]:
        """Return the arguments of the call that the module takes, and has not as attributes."""
        options = {"train": train, "deterministic": not train, **others}
        call: Any = type(self.module).__call__
        return {
            name: value
            for name, value in options.items()
            if takes(call, name) and vars(self.module).get(name) is None
        }

    def __str__(self) -> str:
        return self.linked(f"{type(self.module).__name__}(...)")


def hashable(module: linen.Module) -> linen.Module:
    """Return a module like this one, with tuples for lists in its attributes and its parts'."""
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in _OF_LINEN]
    old = {name: getattr(module, name) for name in names if hasattr(module, name)}
    new = {name: _without_lists(value) for name, value in old.items()}
    changed = {name: value for name, value in new.items() if value is not old[name]}
    return module.clone(**changed) if changed else module


def _without_lists(value: Any) -> Any:
    if isinstance(value, linen.Module):
        return hashable(value)
    if not isinstance(value, list | tuple):
        return value
    new = tuple(map(_without_lists, value))
    same = isinstance(value, tuple) and all(a is b for a, b in zip(value, new, strict=True))
    return value if same else new
