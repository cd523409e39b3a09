"""Describe a layer by a Linen module."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen

from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.sources.arguments import takes
from gpipe_jax.utils.trees import PyTree


@dataclass(frozen=True)
class LinenLayer(Layer):
    """Describe a layer by a Linen module; its variables are parameters only."""

    module: linen.Module

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        variables: Any = self.module.init({"params": key}, x, **self._options(train=False))
        others = sorted(set(variables) - {"params"})
        if others:
            raise UnfitModuleError(
                f"{self} has variables {', '.join(map(repr, others))} beside 'params', which a "
                f"pipeline does not update; for batch norm use an nnx module with nnx.BatchNorm, "
                f"and give constants to the module as arguments"
            )
        return dict(variables.get("params", {}))

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        del stats
        options = self._options(context.train, progress=context.progress)
        # Linen draws from "params" whatever stream a module asks for and was not given.
        return self.module.apply({"params": params}, x, rngs={"params": context.key}, **options), {}

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
