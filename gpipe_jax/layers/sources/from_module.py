"""Divide an nnx model into layers with its values, and put trained values back into it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.constants import part
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources import arguments
from gpipe_jax.layers.sources.instance_layer import InstanceLayer, Origin, from_instance
from gpipe_jax.utils.text import did_you_mean_or_list
from gpipe_jax.utils.trees import PyTree

Block = str | Callable | tuple


class Parts(nnx.Module):
    """Apply a function to parts of a model: the code between its blocks."""

    def __init__(self, function: Callable, parts: dict[str, nnx.Module]) -> None:
        self.function, self.names = function, tuple(parts)
        for name, module in parts.items():
            setattr(self, name, module)

    def __call__(self, x: PyTree, **extras: PyTree) -> PyTree:
        return self.function(*(getattr(self, name) for name in self.names), x, **extras)


class _Piece(NamedTuple):
    """Hold a module that becomes one layer, and where its parts are in the model."""

    module: nnx.Module
    paths: tuple[tuple[tuple, tuple], ...]  # (path in the module, path in the model)


def from_module(model: Any, blocks: Sequence[Block], **kwargs: Any) -> list[Layer]:
    """Divide an nnx model into layers, which start with its values.

    The layers compute what the blocks compute one after the other. Code of the model's `__call__`
    that stands between blocks must be given as a function.

    Args:
        model: An `nnx.Module` instance, which stays as it is; or its class, which is built as
            `model(**kwargs, rngs=nnx.Rngs(0))`.
        blocks: The parts of the model in the order of the data. A name of a module, as "head" or
            "encoder.blocks"; a list of modules gives a layer each. A function of the tensor. Or a
            tuple of names and a function, which takes these modules and the tensor:
            ("norm", "embed", lambda norm, embed, x: embed.attend(norm(x))).
        **kwargs: Arguments of the class. None for an instance.

    Returns:
        The layers. A parameter that several of them use is tied.

    Raises:
        TypeError: `model` is no nnx module, or `kwargs` do not fit its class.
        ArgumentError: A block is no module of the model, or shares statistics with another.

    Example::

        from flax import nnx

        class Model(nnx.Module):
            def __init__(self, *, rngs):
                self.embed = nnx.Embed(64, 32, rngs=rngs)
                self.blocks = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(4)])

        layers = gpipe.from_module(Model(rngs=nnx.Rngs(0)), blocks=["embed", "blocks"])
    """
    model = _instance(model, kwargs)
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not blocks:
        raise ArgumentError(
            "blocks",
            f"`blocks` must be a list of names and functions, got {blocks!r}; name the parts of "
            f'{type(model).__name__} in the order of the data, as ["embed", "blocks", "head"]',
        )
    pieces = [piece for block in blocks for piece in _pieces(model, block)]
    layers = [from_instance(one.module, Origin(model, one.paths)) for one in pieces]
    return _tied(pieces, layers)


def to_module(layers: Sequence[Layer], params: Sequence[PyTree], stats: Sequence[PyTree]) -> Any:
    """Return a copy of the model that all `layers` come from, with these values.

    Raises ArgumentError if a layer is not from `from_module`, or not from the same model.
    """
    origins: list[Origin] = []
    for i, layer in enumerate(layers):
        origin = layer.origin if isinstance(layer, InstanceLayer) else None
        if origin is None or (origins and origin.model is not origins[0].model):
            raise ArgumentError(
                "layers",
                f"layer {i}, {layer}, is not from the model of the other layers; make all "
                f"layers by one call of gpipe_jax.from_module, or read the values by `to_layers`",
            )
        origins.append(origin)
    model = nnx.clone(origins[0].model)
    for origin, *trees in zip(origins, params, stats, strict=True):
        for path, value in jax.tree.leaves_with_path(trees):
            variable = part(model, origin.in_model(tuple(key.key for key in path[1:])))
            variable.set_value(jnp.asarray(value))
    return model


# --- the pieces of a model ------------------------------------------------------------------------


def _instance(model: Any, kwargs: dict) -> nnx.Module:
    if isinstance(model, type) and issubclass(model, nnx.Module):
        arguments.check_constructor(model, (), kwargs)
        own = {"rngs": nnx.Rngs(0)} if arguments.takes(model.__init__, "rngs") else {}
        return model(**kwargs, **own)
    if not isinstance(model, nnx.Module) or kwargs:
        extra = f" and {sorted(kwargs)}" if kwargs else ""
        raise TypeError(
            f"from_module() takes an nnx.Module instance, or its class and its arguments by name; "
            f"got {arguments.kind(model)}{extra}; a model of Linen is divided by hand, with "
            f"gpipe_jax.layer(module) for each part"
        )
    return model


def _pieces(model: nnx.Module, block: Block) -> list[_Piece]:
    if isinstance(block, str):
        found = _find(model, block)
        if isinstance(found, nnx.Module) and not isinstance(found, nnx.List):
            return [_Piece(found, (((), _path(block)),))]
        return [
            _Piece(one, (((), (*_path(block), i)),))
            for i, one in enumerate(_modules(model, block, found))
        ]
    *names, function = block if isinstance(block, tuple) and block else (block,)
    if not callable(function) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            "blocks",
            f"a block is a name, a function, or a tuple of names and a function, got {block!r}",
        )
    parts = {
        name.replace(".", "_"): _modules(model, name, [_find(model, name)])[0] for name in names
    }
    paths = tuple(((name.replace(".", "_"),), _path(name)) for name in names)
    return [_Piece(Parts(function, parts), paths)]


def _modules(model: nnx.Module, name: str, found: Any) -> list[nnx.Module]:
    """Return the modules of a list; raise ArgumentError if it has anything else, or nothing."""
    is_list = isinstance(found, nnx.List | list | tuple) and len(found) > 0
    if not is_list or not all(isinstance(one, nnx.Module) for one in found):
        raise ArgumentError(
            "blocks",
            f"`{name}` of {type(model).__name__} is neither a module nor a list of modules: "
            f"{arguments.kind(found)}; name modules, and give other code as a function",
        )
    return list(found)


def _find(model: nnx.Module, name: str) -> Any:
    try:
        return part(model, _path(name))
    except (AttributeError, KeyError, IndexError, TypeError):
        known = [".".join(map(str, path)) for path, _ in nnx.iter_modules(model) if path]
        raise ArgumentError(
            "blocks",
            f"{type(model).__name__} has no part {name!r}{did_you_mean_or_list(name, known)}",
        ) from None


def _path(name: str) -> tuple:
    return tuple(int(key) if key.isdecimal() else key for key in name.split("."))


# --- what several pieces share --------------------------------------------------------------------


def _tied(pieces: Sequence[_Piece], layers: Sequence[InstanceLayer]) -> list[Layer]:
    """Return the layers, with the parameters tied that several of them hold."""
    users: dict[int, list[tuple[int, tuple]]] = {}
    for i, piece in enumerate(pieces):
        for path, node in nnx.iter_graph(piece.module):
            if isinstance(node, nnx.Param | nnx.BatchStat):
                users.setdefault(id(node), []).append((i, path))
                if isinstance(node, nnx.BatchStat) and len(users[id(node)]) > 1:
                    raise ArgumentError(
                        "blocks",
                        f"the statistics {_name(path)!r} are in the blocks of two layers; a "
                        f"pipeline has one batch norm in one layer, so put the two into a function",
                    )
    tied: list[Layer] = list(layers)
    for shared in users.values():
        first, start = shared[0]
        for i, path in shared if len(shared) > 1 else ():
            tied[i] = tied[i].tie(
                _name(Origin(None, pieces[first].paths).in_model(start)), _name(path)
            )
    return tied


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
