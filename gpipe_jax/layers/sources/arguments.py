"""Check the arguments of `layer`, and say what to write in place of what is not a layer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import linen, nnx


def check_constructor(module: type[nnx.Module], positional: tuple, kwargs: dict) -> None:
    """Raise TypeError unless a module is described by the names that its constructor takes."""
    name, parameters = module.__name__, inspect.signature(module.__init__).parameters
    names = [parameter for parameter in parameters if parameter not in ("self", "rngs")]
    if positional:
        free = [parameter for parameter in names if parameter not in kwargs]
        named = dict(zip(free, positional, strict=False)) | kwargs
        call = ", ".join(f"{key}={brief(value)}" for key, value in named.items())
        raise TypeError(
            f"layer() takes the arguments of {name} by name, got {len(positional)} by position; "
            f"write layer({name}, {call})"
        )
    if "rngs" in kwargs:
        raise TypeError(
            f"layer({name}, ...) takes no `rngs`, got {brief(kwargs['rngs'])}; leave it out, "
            f"as the pipeline makes the random keys of each layer"
        )
    own = {"rngs": None} if "rngs" in parameters else {}
    try:
        inspect.signature(module.__init__).bind(None, **kwargs, **own)
    except TypeError as error:
        raise TypeError(
            f"layer({name}, ...) does not fit the constructor: {error}; the arguments of {name} "
            f"are: {', '.join(names) or 'none'}"
        ) from None


def brief(value: Any) -> str:
    """Return the text of a value if it is short, else the name of its type."""
    text = str(value)
    return text if len(text) <= 24 and "\n" not in text else type(value).__name__


def kind(value: Any) -> str:
    """Name a value in a message; modules print on many lines."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nnx.Module | linen.Module):
        return f"{type(value).__name__}(...), a module instance"
    return f"{value!r} of type {type(value).__name__}"


def remedy(value: Any) -> str:
    """Say how to make a layer of a value that is not one."""
    module = value if isinstance(value, type) else type(value)
    if issubclass(module, linen.Module):
        return f"write layer({module.__name__}(...)), with an instance of the Linen module"
    if issubclass(module, nnx.Module):
        return (
            f"write layer({module.__name__}, ...) with its constructor's arguments by name, "
            f"layer(module) for an instance, or divide a model by gpipe_jax.from_module"
        )
    if inspect.isroutine(value):
        return "if it returns a list of layers, call it and give the list to Pipeline"
    return "write layer(Module, ...) or layer(init, apply)"


@functools.lru_cache(maxsize=4096)
def takes(function: Callable, name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # a function of C has no signature
        return False
