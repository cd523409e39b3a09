"""Find the modules of a model that its blocks name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import linen, nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.constants import part
from gpipe_jax.layers.sources import arguments
from gpipe_jax.utils.text import did_you_mean_or_list

_MOST_SHOWN = 4  # names in a message

Block = str | Callable | tuple


class Named(NamedTuple):
    """Hold a module of a model, and where the model has it."""

    path: tuple  # attributes and indices
    module: Any


class Piece(NamedTuple):
    """Hold what becomes one layer: one module, or a function and the modules that it takes."""

    parts: tuple[Named, ...]
    function: Callable | None = None


def find(model: Any, blocks: Sequence[Block]) -> list[Piece]:
    """Return the pieces of a model of nnx or Linen, in the order of its blocks.

    Raises ArgumentError if a block is no module of the model.
    """
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or not blocks:
        raise ArgumentError(
            "blocks",
            f"`blocks` must be a list of names and functions, got {blocks!r}; name the parts of "
            f'{type(model).__name__} in the order of the data, as ["embed", "blocks", "head"]',
        )
    return [piece for block in blocks for piece in _pieces(model, block)]


def _pieces(model: Any, block: Block) -> Iterator[Piece]:
    if isinstance(block, str):
        for named in _named(model, block):
            is_module = _is_module(named.module)
            yield Piece((named,)) if is_module else Piece((), named.module)
        return
    *names, function = block if isinstance(block, tuple) and block else (block,)
    are_names = all(isinstance(name, str) for name in names)
    if not callable(function) or _is_module(function) or not are_names:
        known = ", ".join(f'"{_name(path)}"' for path in _known(model)[:_MOST_SHOWN])
        raise ArgumentError(
            "blocks",
            f"a block is a name, a function, or a tuple of names and a function, as "
            f'("norm", "embed", function), got {arguments.kind(block)}; give a module by its name '
            f"in {type(model).__name__}, such as {known}",
        )
    if len(set(names)) < len(names):
        raise ArgumentError(
            "blocks",
            f"a tuple names a module twice: {', '.join(names)}; name it once, and use it twice in "
            f"the function",
        )
    yield Piece(tuple(_single(model, name) for name in names), function)


def _single(model: Any, name: str) -> Named:
    modules = _named(model, name)
    if len(modules) > 1 or not _is_module(modules[0].module):
        raise ArgumentError(
            "blocks",
            f"`{name}` of {type(model).__name__} is a list, but a function takes single modules; "
            f'name those that it uses, as "{name}.0"',
        )
    return modules[0]


def _named(model: Any, name: str) -> list[Named]:
    """Return the module of this name, or the modules and functions of a list."""
    value, path = _find(model, name), _path(name)
    if _is_module(value):
        return [Named(path, value)]
    is_list = isinstance(value, nnx.List | list | tuple) and len(value) > 0
    if not is_list or not all(map(callable, value)):
        raise ArgumentError(
            "blocks",
            f"`{name}` of {type(model).__name__} is neither a module nor a list of modules: "
            f"{arguments.kind(value)}; name modules, and give other code as a function",
        )
    return [Named((*path, i), module) for i, module in enumerate(value)]


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Module | linen.Module) and not isinstance(value, nnx.List)


def _find(model: Any, name: str) -> Any:
    try:
        return part(model, _path(name))
    except (AttributeError, KeyError, IndexError, TypeError):
        known = [_name(path) for path in _known(model)]
        hint = did_you_mean_or_list(name, known) if known else _NO_PARTS
        raise ArgumentError(
            "blocks", f"{type(model).__name__} has no part {name!r}{hint}"
        ) from None


_NO_PARTS = (
    "; only modules that `setup` makes have names, so make the parts of a compact module there, or "
    "write gpipe_jax.layer(module) for each part"
)


def _known(model: Any) -> list[tuple]:
    """Return the paths of the modules of a model."""
    if isinstance(model, nnx.Module):
        return [path for path, _ in nnx.iter_modules(model) if path]
    parts = [(name, value) for name, value in vars(model).items() if name != "parent"]
    lists = [(name, value) for name, value in parts if isinstance(value, tuple) and value]
    of_modules = [(name,) for name, value in lists if all(map(_is_module, value))]
    return [(name,) for name, value in parts if _is_module(value)] + of_modules


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _path(name: str) -> tuple:
    return tuple(int(key) if key.isdecimal() else key for key in name.split("."))
