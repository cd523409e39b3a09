"""Describe a layer by two functions: `init` makes parameters, `apply` computes the output."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen
from flax.errors import InvalidRngError

from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.sources.arguments import takes
from gpipe_jax.utils.trees import PyTree, first_without_type

_STATISTICS = "batch_stats"  # Linen's name for the running statistics of batch norms


@dataclass(frozen=True)
class FunctionLayer(Layer):
    """Describe a layer by two functions (init, apply)."""

    init_fn: Callable
    apply_fn: Callable

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        del extras  # parameters do not depend on them
        params = self.init_fn(key, x)
        if found := first_without_type(params):
            path, leaf = found
            raise UnfitModuleError(
                f"{self}: its `init` returns {leaf!r} of type {type(leaf).__name__} at "
                f"params{path}; parameters are arrays, so keep it in `apply`"
            )
        self._check_collections(params)
        return params

    def _check_collections(self, params: PyTree) -> None:
        """Refuse what Linen modules return beside parameters: a pipeline would train it."""
        if not isinstance(params, Mapping):
            return
        of_linen = isinstance(_owner(self.init_fn), linen.Module)
        others = [name for name in params if (of_linen and name != "params") or name == _STATISTICS]
        if others:
            raise UnfitModuleError(
                f"{self}: its `init` returns {', '.join(map(repr, others))}, but a pipeline "
                f"trains all that `init` returns; return 'params' only, and give constants to "
                f"`apply` yourself; for batch norm use an nnx module with nnx.BatchNorm, whose "
                f"running statistics a pipeline updates"
            )

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        del stats
        options = {
            "rngs": context.key if context.train else None,
            "train": context.train,
            "progress": context.progress,
        }
        taken = {name: value for name, value in options.items() if takes(self.apply_fn, name)}
        try:
            return self.apply_fn(params, x, **taken, **context.extras), {}
        except InvalidRngError as error:
            raise UnfitModuleError(
                f"{self} draws random numbers, but its `apply` gives no key to the Linen module; "
                f"write layer(module), or take `rngs` in `apply` and pass it on"
            ) from error

    def __str__(self) -> str:
        owner, function = _owner(self.apply_fn), _function(self.apply_fn)
        name = getattr(function, "__name__", repr(function))
        return self.linked(name if owner is None else type(owner).__name__)


def _function(function: Callable) -> Callable:
    """Return the function that a `functools.partial` calls, or the function itself."""
    return function.func if isinstance(function, functools.partial) else function


def _owner(function: Callable) -> Any:
    """Return the Linen module whose `init` or `apply` this is, or None."""
    return getattr(_function(function), "__self__", None)
