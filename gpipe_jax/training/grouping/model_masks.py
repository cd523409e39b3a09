"""Turn a mask, or labels, for the parameters of a user's model into one for the layers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen, nnx
from flax.core import unfreeze

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.sources.from_module import origins
from gpipe_jax.utils.text import did_you_mean
from gpipe_jax.utils.trees import PyTree, path_name

if TYPE_CHECKING:
    from gpipe_jax.pipeline.pipeline import Pipeline


def for_layers(pipe: "Pipeline", mask: PyTree | Callable[[PyTree], PyTree]) -> list[PyTree]:
    """Turn a mask, or labels, for a model's own parameters into one for the pipeline's layers.

    Args:
        pipe: A pipeline of layers from `gpipe_jax.from_module`.
        mask: A mask for optax, or labels: a tree like `nnx.state(model, nnx.Param)`, or like the
            "params" of a Linen model. A value in the place of a part counts for all its parameters.
            Or a function that makes such a tree of the parameters.

    Returns:
        A list of trees, which optax takes in a `gpipe_jax.Trainer`. A tied parameter has the value
        of its first layer; frozen ones have none.

    Raises:
        ArgumentError: The mask lacks a parameter or has others, or a layer is of no model.

    Example::

        def is_matrix(params):
            return jax.tree.map(lambda a: a.ndim > 1, params)

        tx = optax.adamw(1e-3, mask=gpipe.optimizers.for_layers(pipe, is_matrix))
    """
    places = origins(
        pipe.layers, "write the mask for the list of trees that `pipe.to_layers(state)` returns"
    )
    params = _parameters(places[0].model)
    values = _by_parameter(mask(params) if callable(mask) else mask, params)

    def value(i: int, path: tuple) -> Any:
        return values[_name(places[i].in_model(tuple(key.key for key in path)))]

    return [
        jax.tree.map_with_path(lambda path, _, i=i: value(i, path), shape.params)
        for i, shape in enumerate(pipe.shapes)
    ]


def _parameters(model: Any) -> PyTree:
    if isinstance(model, linen.Module):
        return unfreeze(dict(model.variables["params"]))
    return nnx.state(model, nnx.Param)


def _by_parameter(mask: PyTree, params: PyTree) -> dict[str, Any]:
    """Return the value of each parameter of a model, by its name."""
    given, unused = _named(mask), set(_named(mask))
    values = {}
    for name in _named(params):
        keys = name.split(".")
        above = [".".join(keys[:n]) for n in range(len(keys), -1, -1)]  # the nearest first
        found = next((part for part in above if part in given), None)
        if found is None:
            raise ArgumentError(
                "mask",
                f"`mask` has no value for the parameter {name!r} of the model; make it of the "
                f"tree nnx.state(model, nnx.Param), or of the 'params' of a Linen model",
            )
        values[name] = given[found]
        unused.discard(found)
    if unused:
        first = min(unused)
        raise ArgumentError(
            "mask",
            f"`mask` has a value for {first!r}, but the model has no such parameter"
            f"{did_you_mean(first, list(values))}; remove it",
        )
    return values


def _named(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree of parameters by name; those of Linen may be in "params"."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    if isinstance(tree, Mapping):
        tree = unfreeze(dict(tree))
        tree = tree["params"] if set(tree) == {"params"} else tree
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
