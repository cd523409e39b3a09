"""Divide a model into layers with its values, and put trained values back into it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.constants import part
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources import arguments, linen_model
from gpipe_jax.layers.sources.blocks import Block, Piece, find
from gpipe_jax.layers.sources.instance_layer import InstanceLayer, Origin, from_instance
from gpipe_jax.layers.sources.linen_model import BoundLinenLayer
from gpipe_jax.utils.trees import PyTree

_Divided = InstanceLayer | BoundLinenLayer


class Parts(nnx.Module):
    """Apply a function to parts of a model: the code between its blocks."""

    def __init__(self, function: Callable, parts: dict[str, nnx.Module]) -> None:
        self._function, self._names = function, tuple(parts)
        for name, module in parts.items():
            setattr(self, name, module)

    def __call__(self, x: PyTree, **extras: PyTree) -> PyTree:
        return self._function(*(getattr(self, name) for name in self._names), x, **extras)


def from_module(model: Any, blocks: Sequence[Block], **kwargs: Any) -> list[Layer]:
    """Divide a model into layers, which start with its values.

    The layers compute what the blocks compute one after the other. Code of the model's `__call__`
    that stands between blocks must be given as a function.

    Args:
        model: An `nnx.Module` instance, which stays as it is; or its class, which is built as
            `model(**kwargs, rngs=nnx.Rngs(0))`. Or a Linen module with its values, as
            `module.bind(variables)`, whose parts are made in `setup`.
        blocks: The parts of the model in the order of the data. A name of a module, as "head" or
            "encoder.blocks"; a list of modules gives a layer each. A function of the tensor. Or a
            tuple of names and a function, which takes these modules and the tensor:
            ("norm", "embed", lambda norm, embed, x: embed.attend(norm(x))). A pipeline refuses
            a function that uses other parts of the model.
        **kwargs: Arguments of the class. None for an instance.

    Returns:
        The layers. A parameter that several of them use is tied.

    Raises:
        TypeError: `model` is no nnx module or bound Linen module, or `kwargs` do not fit its class.
        ArgumentError: A block is no module of the model, or shares statistics with another.

    Example::

        from flax import nnx

        class Model(nnx.Module):
            def __init__(self, *, rngs):
                self.embed = nnx.Embed(64, 32, rngs=rngs)
                self.blocks = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(4)])

        layers = gpipe.from_module(Model(rngs=nnx.Rngs(0)), blocks=["embed", "blocks"])
    """
    model = _copy(_instance(model, kwargs))
    pieces = find(model, blocks)
    if isinstance(model, linen.Module):
        return _tied([linen_model.from_piece(model, piece) for piece in pieces])
    return _tied([_from_nnx(model, piece) for piece in pieces])


def to_module(layers: Sequence[Layer], params: Sequence[PyTree], stats: Sequence[PyTree]) -> Any:
    """Return a copy of the model that all `layers` come from, with these values.

    Raises ArgumentError if a layer is not from `from_module`, or not from the same model.
    """
    places = origins(layers, "read the values by `to_layers`")
    model = places[0].model
    values = {
        origin.in_model(tuple(key.key for key in path[1:])): jnp.asarray(value)
        for origin, *trees in zip(places, params, stats, strict=True)
        for path, value in jax.tree.leaves_with_path(trees)
    }
    if isinstance(model, linen.Module):
        return linen_model.with_values(model, values)
    model = nnx.clone(model)
    for path, value in values.items():
        part(model, path).set_value(value)
    return model


def origins(layers: Sequence[Layer], otherwise: str) -> list[Origin]:
    """Return where the layers are in the one model that all come from.

    Raises ArgumentError if a layer is not from `from_module`, or not from the same model; the
    message ends with what to do otherwise.
    """
    places: list[Origin] = []
    for i, layer in enumerate(layers):
        origin = layer.origin if isinstance(layer, _Divided) else None
        if origin is None or (places and origin.model is not places[0].model):
            raise ArgumentError(
                "layers",
                f"layer {i}, {layer}, is not from the model of the other layers; make all "
                f"layers by one call of gpipe_jax.from_module, or {otherwise}",
            )
        places.append(origin)
    return places


# --- the model ------------------------------------------------------------------------------------


def _instance(model: Any, kwargs: dict) -> Any:
    if isinstance(model, type) and issubclass(model, nnx.Module):
        arguments.check_constructor(model, (), kwargs, "from_module")
        own = {"rngs": nnx.Rngs(0)} if arguments.takes(model.__init__, "rngs") else {}
        return model(**kwargs, **own)
    is_bound = isinstance(model, linen.Module) and model.scope is not None
    if kwargs or not (is_bound or isinstance(model, nnx.Module)):
        extra = f" and {sorted(kwargs)}" if kwargs else ""
        raise TypeError(
            f"from_module() takes an nnx.Module instance, or its class and its arguments by name, "
            f"or a bound Linen module; got {arguments.kind(model)}{extra}; {_remedy(model, kwargs)}"
        )
    return model


def _copy(model: Any) -> Any:
    """Return a model with these values, which stay as they are when those of `model` change."""
    if isinstance(model, linen.Module):
        return linen_model.with_values(model, {})
    return nnx.clone(model)


def _remedy(model: Any, kwargs: dict) -> str:
    module = model if isinstance(model, type) else type(model)
    name = module.__name__
    if issubclass(module, linen.Module):
        return (
            f"write from_module({name}(...).bind(variables), blocks), with the variables that "
            f"{name}(...).init returns"
        )
    if kwargs and issubclass(module, nnx.Module):
        return f"leave out {', '.join(kwargs)}, or give the class {name}"
    return "make a layer of each module of a list by gpipe_jax.layer(module)"


def _from_nnx(model: nnx.Module, piece: Piece) -> InstanceLayer:
    """Describe a layer by parts of an nnx model."""
    if piece.function is None:
        [(path, module)] = piece.parts
        return from_instance(module, Origin(model, (((), path),)))
    names = ["_".join(map(str, path)) for path, _ in piece.parts]
    if len(set(names)) < len(names):  # as of "a.b" and "a_b"
        names = [f"part{i}" for i in range(len(names))]
    parts = dict(zip(names, (module for _, module in piece.parts), strict=True))
    paths = tuple(((name,), path) for name, (path, _) in zip(names, piece.parts, strict=True))
    return from_instance(Parts(piece.function, parts), Origin(model, paths))


# --- what several layers share --------------------------------------------------------------------


def _tied(layers: Sequence[_Divided]) -> list[Layer]:
    """Return the layers, with the parameters tied that several of them hold."""
    users: dict[Any, list[_Use]] = {}
    for i, layer in enumerate(layers):
        for use in _uses(i, layer):
            users.setdefault(use.key, []).append(use)
    tied: list[Layer] = list(layers)
    for uses in users.values():
        first, *others = uses
        if others and first.is_statistic:
            raise ArgumentError(
                "blocks",
                f"the statistics {_name(first.path)!r} are in the blocks of two layers; a "
                f"pipeline has one batch norm in one layer, so put the two into a function",
            )
        for use in uses if others else ():
            tied[use.layer] = tied[use.layer].tie(_name(first.in_model), _name(use.path))
    return tied


class _Use(NamedTuple):
    """Hold where a layer has an array of the model."""

    key: Any  # of the array
    layer: int
    path: tuple  # in the layer
    in_model: tuple
    is_statistic: bool


def _uses(i: int, layer: _Divided) -> Iterator[_Use]:
    assert layer.origin is not None
    for is_statistic, tree in enumerate(layer.values):
        for keys, _ in jax.tree.leaves_with_path(tree):
            path = tuple(key.key for key in keys)
            in_model, model = layer.origin.in_model(path), layer.origin.model
            # Parts of an nnx model may hold one variable; Linen has each under one path.
            key = in_model if isinstance(model, linen.Module) else id(part(model, in_model))
            yield _Use(key, i, path, in_model, bool(is_statistic))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
