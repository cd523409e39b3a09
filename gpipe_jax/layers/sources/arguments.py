"""Check the arguments of `layer`, and say what to write in place of what is not a layer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import linen, nnx

from gpipe_jax.utils.text import did_you_mean


def check_constructor(
    module: type[nnx.Module], positional: tuple, kwargs: dict, call: str = "layer"
) -> None:
    """Raise TypeError unless a module is described by the names that its constructor takes.

    `call` is the function that was called, for the message.
    """
    name, parameters = module.__name__, inspect.signature(module.__init__).parameters
    names = [parameter for parameter in parameters if parameter not in ("self", "rngs")]
    if positional:
        free = [parameter for parameter in names if parameter not in kwargs]
        named = dict(zip(free, positional, strict=False)) | kwargs
        words = ", ".join(f"{key}={brief(value)}" for key, value in named.items())
        raise TypeError(
            f"layer() takes the arguments of {name} by name, got {len(positional)} by position; "
            f"write layer({name}, {words})"
        )
    if "rngs" in kwargs:
        raise TypeError(
            f"{call}({name}, ...) takes no `rngs`, got {brief(kwargs['rngs'])}; leave it out, "
            f"as the pipeline makes the random keys of each layer"
        )
    own = {"rngs": None} if "rngs" in parameters else {}
    try:
        inspect.signature(module.__init__).bind(None, **kwargs, **own)
    except TypeError as error:
        unknown = [key for key in kwargs if key not in names]
        hint = f"; it has no {unknown[0]!r}{did_you_mean(unknown[0], names)}" if unknown else ""
        raise TypeError(
            f"{call}({name}, ...) does not fit the constructor: {error}; the arguments of {name} "
            f"are: {', '.join(names) or 'none'}{hint}"
        ) from None


def check_hashable(layer: Any) -> None:
    """Raise TypeError unless a description of a layer can be compared with others."""
    try:
        hash(layer)
    except TypeError as error:
        raise TypeError(
            f"the arguments of a layer must be hashable, so that equal layers can be found: "
            f"{layer}: {first_line(error)}; give numbers, texts, tuples and functions"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def brief(value: Any) -> str:
    """Return the text of a value if it is short, else the name of its type."""
    text = str(value)
    return text if len(text) <= 24 and "\n" not in text else type(value).__name__


def kind(value: Any) -> str:
    """Name a value in a message in one line; modules and arrays print on many."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nnx.Module | linen.Module):
        return f"{type(value).__name__}(...), a module instance"
    if isinstance(value, list | tuple) and any(map(_is_module, value)):
        return f"a {type(value).__name__} of modules"
    text = repr(value)
    name = type(value).__name__
    return f"a value of type {name}" if "\n" in text else f"{text} of type {name}"


def remedy(value: Any) -> str:
    """Say how to make a layer of a value that is not one."""
    module = value if isinstance(value, type) else type(value)
    if issubclass(module, linen.Module):
        return (
            f"write layer({module.__name__}(...)), with an instance of the Linen module and "
            f"without other arguments"
        )
    if issubclass(module, nnx.Module):
        return (
            f"write layer({module.__name__}, ...) with its constructor's arguments by name, "
            f"layer(module) for an instance, or divide a model by gpipe_jax.from_module"
        )
    if inspect.isroutine(value):
        return "if it returns a list of layers, call it and give the list to Pipeline"
    return "write layer(Module, ...) or layer(init, apply)"


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Module | linen.Module)


@functools.lru_cache(maxsize=4096)
def takes(function: Callable, name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # a function of C has no signature
        return False
