"""Describe one layer of a network, from a module or from two functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import linen, nnx

from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources import arguments
from gpipe_jax.layers.sources.function_layer import FunctionLayer
from gpipe_jax.layers.sources.instance_layer import from_instance
from gpipe_jax.layers.sources.linen_layer import LinenLayer, hashable
from gpipe_jax.layers.sources.linen_model import from_bound
from gpipe_jax.layers.sources.module_layer import ModuleLayer


def layer(target: Any, /, *functions: Callable, **kwargs: Any) -> Layer:
    """Describe one layer of a network.

    `layer(Module, **kwargs)` describes the `nnx.Module` that `Module(**kwargs)` builds.
    `layer(module)` describes an nnx instance, which starts with its values, or a Linen module. A
    Linen module starts with values if it is bound to them, as `module.bind(variables)`.
    `layer(init, apply)` describes a layer of plain JAX by two functions.

    Args:
        target: An `nnx.Module` class or instance; a Linen module; or `init`, a function (key, x)
            -> parameters. A class is built with `rngs=` if it takes that. A module is called as
            `module(x)`, with `rngs=` (nnx), with `train=` or `deterministic=` (Linen), and with
            `progress=` (of the training run, 0 to 1) if it takes these.
        *functions: With `init` one function, `apply`: (params, x) -> output. If it takes `rngs`, it
            gets the random key in training and None in evaluation. It gets `train` and `progress`
            if it takes them. None for an `nnx.Module`.
        **kwargs: Arguments of the module class; they must be hashable. Lists become tuples.

    Returns:
        The description of the layer. Nothing is built.

    Raises:
        TypeError: The arguments are of the wrong kind or not hashable, or the constructor of the
            module does not take them.

    Arrays in plain attributes and other variables of an nnx module are constants: not trained. In
    a class they must not be drawn at random. An instance trains in the mode in which it is given.
    The same instance in two layers is two layers that start alike; `tie` their parameters to share.
    Modules that hold their own `nnx.Rngs` (`nnx.Dropout`) get them reseeded for each micro-batch.
    An `nnx.BatchNorm` normalises with the statistics of the micro-batch, whatever the weights of
    the examples. Its running statistics change once a step, from its last call in the layer.

    Example:
        >>> from flax import linen, nnx
        >>> str(layer(nnx.Linear, in_features=4, out_features=2))
        'Linear(in_features=4, out_features=2)'
    """
    if isinstance(target, nnx.Module) and not functions and not kwargs:
        description: Layer = from_instance(target)
    elif isinstance(target, linen.Module) and not functions and not kwargs:
        description = LinenLayer(hashable(target)) if target.scope is None else from_bound(target)
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
        got += f" and {', '.join(kwargs)}=" if kwargs else ""
        raise TypeError(
            f"layer() takes a flax.nnx.Module class and its arguments, a module instance, or two "
            f"functions (init, apply); got {got}; {arguments.remedy(target)}"
        )
    arguments.check_hashable(description)
    return description


def _freeze(value: Any) -> Any:
    if isinstance(value, np.generic):  # a number of NumPy makes the same layer as one of Python
        return value.item()
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _types(value: Any) -> tuple:
    """Return the types in `value`: 1, 1.0 and True are equal, but make different layers."""
    inner = tuple(map(_types, value)) if isinstance(value, list | tuple) else ()
    return (type(value).__name__, *inner)
