"""What a layer is: a value that says how to make parameters and how to apply them.

A network is a sequence of layers, and every layer has one calling convention: one pytree in, one
pytree out. `layer(Module, **kwargs)` only *describes* a `flax.nnx.Module`; the module is built
where it is needed, under tracing. Descriptions are compared by value, which is how equal layers are
found and share one compiled body.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

PyTree = Any


@dataclass(frozen=True)
class Layer:
    """A description of a layer; see `layer`. Subclasses say how it is made and applied."""

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        """Fresh parameters, a tree of arrays, for an input like `x`."""
        raise NotImplementedError

    def apply(self, params: PyTree, x: PyTree, key: jax.Array, *, train: bool) -> PyTree:
        """The output for input `x`. `key` is the only source of randomness."""
        raise NotImplementedError


def layer(target: Any, apply: Callable | None = None, /, **kwargs: Any) -> Layer:
    """Describe one layer of the network.

    `layer(Module, **kwargs)` is the `nnx.Module` that `Module(**kwargs, rngs=...)` builds (`rngs`
    only if it takes them); it is called as `module(x)`, with `rngs=` if it takes them. Modules that
    keep their own `nnx.Rngs` (Dropout) get theirs reseeded for every micro-batch.

    `layer(init, apply)` is a pair of functions, as of Linen or plain JAX: `init(key, x)` returns
    parameters and `apply(params, x)` the output. If it takes `rngs`, it gets the key in training
    and None in evaluation; if it takes `train`, it gets whether this is training.
    """
    if apply is not None:
        if kwargs:
            raise TypeError(f"layer(init, apply) takes no keywords, got {sorted(kwargs)}")
        return FunctionLayer(target, apply)
    if not (isinstance(target, type) and issubclass(target, nnx.Module)):
        raise TypeError(
            f"layer() takes a flax.nnx.Module class and its arguments, or two functions "
            f"(init, apply); got {target!r}"
        )
    frozen = {name: _freeze(value) for name, value in kwargs.items()}
    description = ModuleLayer(target, tuple(sorted(frozen.items())), _types(list(frozen.values())))
    try:
        hash(description)
    except TypeError as error:
        raise TypeError(
            f"the arguments of a layer must be hashable, so that equal layers can be found: "
            f"{description}: {error}"
        ) from None
    return description


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _types(value: Any) -> tuple:
    """The types of the arguments: 1, 1.0 and True are equal, but make different layers."""
    parts = tuple(map(_types, value)) if isinstance(value, list | tuple) else ()
    return (type(value).__name__, *parts)


@dataclass(frozen=True)
class FunctionLayer(Layer):
    """A pair of functions (init, apply)."""

    init_fn: Callable
    apply_fn: Callable

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        return self.init_fn(key, x)

    def apply(self, params: PyTree, x: PyTree, key: jax.Array, *, train: bool) -> PyTree:
        known = {"rngs": key if train else None, "train": train}
        wanted = {name: value for name, value in known.items() if _takes(self.apply_fn, name)}
        return self.apply_fn(params, x, **wanted)

    def __str__(self) -> str:
        owner = getattr(self.apply_fn, "__self__", None)
        name = getattr(self.apply_fn, "__name__", repr(self.apply_fn))
        return name if owner is None else type(owner).__name__


class Template(NamedTuple):
    """The static half of a module: its graph in both modes, and the paths of its random streams."""

    train: nnx.GraphDef
    evaluate: nnx.GraphDef
    rng_state: tuple[tuple[tuple, type], ...]


@dataclass(frozen=True)
class ModuleLayer(Layer):
    """An `nnx.Module` class and the arguments to build it with."""

    module: type[nnx.Module]
    kwargs: tuple[tuple[str, Any], ...]
    types: tuple  # of the arguments, so that equal layers are equal in these too

    def build(self, key: jax.Array) -> nnx.Module:
        """The module itself, with every parameter."""
        rngs = {"rngs": nnx.Rngs(key)} if _takes(self.module.__init__, "rngs") else {}
        return self.module(**dict(self.kwargs), **rngs)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        del x  # nnx modules know the shape of their input
        return nnx.to_pure_dict(nnx.split(self.build(key), nnx.Param, ...)[1])

    def apply(self, params: PyTree, x: PyTree, key: jax.Array, *, train: bool) -> PyTree:
        template = _template(self)
        streams = [(path, _stream_value(kind, key, i)) for i, (path, kind) in _streams(template)]
        graph = template.train if train else template.evaluate
        module = nnx.merge(graph, params, nnx.to_pure_dict(nnx.from_flat_state(streams)))
        if _takes(self.module.__call__, "rngs"):
            return module(x, rngs=nnx.Rngs(key))
        return module(x)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.kwargs)
        return f"{self.module.__name__}({arguments})"


def _streams(template: Template) -> list:
    return list(enumerate(template.rng_state))


def _stream_value(kind: type, key: jax.Array, i: int) -> nnx.Variable:
    value = jax.random.fold_in(key, i) if issubclass(kind, nnx.RngKey) else jax.numpy.uint32(0)
    return kind(value)


@functools.lru_cache(maxsize=4096)
def _template(description: ModuleLayer) -> Template:
    """Built abstractly: no array of the module ever exists."""
    module = nnx.eval_shape(lambda: description.build(jax.random.key(0)))
    train, _, rng_state, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    unknown = nnx.to_flat_state(rest)
    if unknown:
        found = ", ".join(sorted({type(v).__name__ for _, v in unknown}))
        raise ValueError(
            f"layer {description} has variables of type {found}; a pipeline layer may hold "
            f"nnx.Param and random streams only (for normalisation use GroupNorm or LayerNorm)"
        )
    module.eval()
    evaluate = nnx.split(module, nnx.Param, ...)[0]
    flat = tuple((path, type(variable)) for path, variable in nnx.to_flat_state(rng_state))
    return Template(train, evaluate, flat)


@functools.lru_cache(maxsize=4096)
def _takes(function: Callable, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters
