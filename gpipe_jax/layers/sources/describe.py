"""Describe one layer of a network, from a module or from two functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources import arguments
from gpipe_jax.layers.sources.function_layer import FunctionLayer
from gpipe_jax.layers.sources.instance_layer import from_instance
from gpipe_jax.layers.sources.module_layer import ModuleLayer


def layer(target: Any, /, *functions: Callable, **kwargs: Any) -> Layer:
    """Describe one layer of a network.

    `layer(Module, **kwargs)` describes the `nnx.Module` that `Module(**kwargs)` builds.
    `layer(init, apply)` describes a layer of Linen or plain JAX by two functions.

    Args:
        target: An `nnx.Module` class; or `init`, a function (key, x) -> parameters. A module is
            built with `rngs=` if it takes that. It is called as `module(x)`, with `rngs=` if it
            takes that, and with `progress=` (of the training run, 0 to 1) if it takes that.
        *functions: With `init` one function, `apply`: (params, x) -> output. If it takes `rngs`, it
            gets the random key in training and None in evaluation. It gets `train` and `progress`
            if it takes them. None for an `nnx.Module`.
        **kwargs: Arguments of the module class; they must be hashable. Lists become tuples.

    Returns:
        The description of the layer. Nothing is built.

    Raises:
        TypeError: The arguments are of the wrong kind or not hashable, or the constructor of the
            module does not take them.

    An array that a module keeps as a plain attribute is a constant; it must not be drawn at random.
    Modules that hold their own `nnx.Rngs` (`nnx.Dropout`) get them reseeded for each micro-batch.
    An `nnx.BatchNorm` normalises with the statistics of the micro-batch, whatever the weights of
    the examples. Its running statistics change once a step, from its last call in the layer.

    Example:
        >>> from flax import nnx
        >>> str(layer(nnx.Linear, in_features=4, out_features=2))
        'Linear(in_features=4, out_features=2)'
    """
    if isinstance(target, nnx.Module) and not functions and not kwargs:
        description: Layer = from_instance(target)
    elif isinstance(target, type) and issubclass(target, nnx.Module):
        arguments.check_constructor(target, functions, kwargs)
        frozen = {name: _freeze(value) for name, value in kwargs.items()}
        types = _types(list(frozen.values()))
        description = ModuleLayer(target, tuple(sorted(frozen.items())), types)
    elif len(functions) == 1 and callable(target) and callable(functions[0]):
        if kwargs:
            raise TypeError(f"layer(init, apply) takes no keywords, got {sorted(kwargs)}")
        description = FunctionLayer(target, functions[0])
    else:
        got = " and ".join(map(arguments.kind, (target, *functions)))
        raise TypeError(
            f"layer() takes a flax.nnx.Module class and its arguments, or two functions "
            f"(init, apply); got {got}; {arguments.remedy(target)}"
        )
    try:
        hash(description)
    except TypeError as error:
        raise TypeError(
            f"the arguments of a layer must be hashable, so that equal layers can be found: "
            f"{description}: {error}"
        ) from None
    return description


def _freeze(value: Any) -> Any:
    if isinstance(value, np.generic):  # a number of NumPy makes the same layer as one of Python
        return value.item()
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _types(value: Any) -> tuple:
    """Return the types in `value`: 1, 1.0 and True are equal, but make different layers."""
    inner = tuple(map(_types, value)) if isinstance(value, list | tuple) else ()
    return (type(value).__name__, *inner)
