"""What a layer is: a value that says how to make parameters and how to apply them.

A network is a sequence of layers, and every layer has one calling convention: one pytree in, one
pytree out. `layer(Module, **kwargs)` only *describes* a `flax.nnx.Module`; the module is built
where it is needed, under tracing. Descriptions are compared by value, which is how equal layers are
found and share one compiled body.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
from flax import nnx

from gpipe_jax.layers import batch_norm
from gpipe_jax.utils.trees import PyTree


@dataclass(frozen=True)
class Context:
    """What a layer is told about the call: one micro-batch of one step."""

    key: jax.Array  # of this layer, micro-batch and step: the only source of randomness
    train: bool
    progress: jax.Array | float = 1.0  # of the training run, 0 to 1


@dataclass(frozen=True)
class Layer:
    """A description of a layer; see `layer`. Subclasses say how it is made and applied."""

    stashes: tuple[str, ...] = field(default=(), kw_only=True)
    pops: tuple[str, ...] = field(default=(), kw_only=True)
    ties: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)  # (path, name)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        """Fresh parameters, a tree of arrays, for an input like `x`."""
        raise NotImplementedError

    def init_statistics(self) -> PyTree:
        """Fresh running statistics of batch norms; no leaves for a layer without."""
        return {}

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree]:
        """Parameters and statistics as trees of `jax.ShapeDtypeStruct`, for an input like `x`."""
        params = jax.eval_shape(lambda x: self.init(jax.random.key(0), x), x)
        return params, jax.eval_shape(self.init_statistics)

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        """The output for input `x`, and in training the moments of this micro-batch.

        Moments have the form of `stats`. The pipeline averages them over all micro-batches and
        gives the average to `commit`, once a step.
        """
        raise NotImplementedError

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        """The running statistics after a step, from the average moments of its micro-batches."""
        del moments
        return stats

    def stash(self, *names: str) -> Self:
        """This layer, whose output is (y, *kept): y goes on, the rest waits to be popped by name.

        The kept tensors may cross any number of stages; no stage in between computes with them.
        """
        return replace(self, stashes=(*self.stashes, *names))

    def pop(self, *names: str) -> Self:
        """This layer, whose input is (x, *popped): what earlier layers stashed by these names."""
        return replace(self, pops=(*self.pops, *names))

    def tie(self, name: str, path: str) -> Self:
        """This layer, whose parameter at `path` ("linear.kernel") is the one called `name`.

        All layers that tie the same name share one parameter, which the first of them makes.
        """
        return replace(self, ties=(*self.ties, (path, name)))

    def linked(self, description: str) -> str:
        """`description` with the names of what is stashed, popped and tied."""
        ties = [f"{path} as {name}" for path, name in self.ties]
        words = {"stash": self.stashes, "pop": self.pops, "tie": ties}
        parts = [f"{verb} {', '.join(names)}" for verb, names in words.items() if names]
        return " ".join([description, *(f"[{part}]" for part in parts)])


def layer(target: Any, apply: Callable | None = None, /, **kwargs: Any) -> Layer:
    """Describe one layer of the network.

    `layer(Module, **kwargs)` is the `nnx.Module` that `Module(**kwargs, rngs=...)` builds (`rngs`
    only if it takes them); it is called as `module(x)`, with `rngs=` if it takes them, and with
    `progress=` (of the training run, 0 to 1) if it takes that. Modules that keep their own
    `nnx.Rngs` (Dropout) get theirs reseeded for every micro-batch. An `nnx.BatchNorm` normalises
    with the statistics of the micro-batch, whatever the examples' weights; its running ones change
    once a step, by what its last call in the layer saw.

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

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        del stats
        known = {
            "rngs": context.key if context.train else None,
            "train": context.train,
            "progress": context.progress,
        }
        wanted = {name: value for name, value in known.items() if _takes(self.apply_fn, name)}
        return self.apply_fn(params, x, **wanted), {}

    def __str__(self) -> str:
        owner = getattr(self.apply_fn, "__self__", None)
        name = getattr(self.apply_fn, "__name__", repr(self.apply_fn))
        return self.linked(name if owner is None else type(owner).__name__)


class Template(NamedTuple):
    """The static half of a module: its graph in both modes, and what it holds beside parameters."""

    params: PyTree  # as shapes
    stats: PyTree  # likewise
    train: nnx.GraphDef
    evaluate: nnx.GraphDef
    rng_state: tuple[tuple[tuple, type], ...]  # paths of its random streams
    norms: tuple[batch_norm.Norm, ...]


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

    def init_statistics(self) -> PyTree:
        return batch_norm.fresh(_template(self).stats)

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        return _template(self).params, _template(self).stats

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        template, key = _template(self), context.key
        kinds = enumerate(template.rng_state)
        streams = [(path, _stream_value(kind, key, i)) for i, (path, kind) in kinds]
        graph = template.train if context.train else template.evaluate
        rng_state = nnx.to_pure_dict(nnx.from_flat_state(streams))
        module = nnx.merge(graph, params, stats, rng_state)
        known = {"rngs": nnx.Rngs(key), "progress": context.progress}
        call = self.module.__call__
        y = module(x, **{name: value for name, value in known.items() if _takes(call, name)})
        if not (context.train and template.norms):
            return y, {}
        seen = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return y, batch_norm.moments(template.norms, stats, seen)

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return batch_norm.commit(_template(self).norms, stats, moments)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={_brief(value)}" for name, value in self.kwargs)
        return self.linked(f"{self.module.__name__}({arguments})")


def _brief(value: Any) -> str:
    """The value itself if that is short, else its type."""
    text = str(value)
    return text if len(text) <= 24 and "\n" not in text else type(value).__name__


def _stream_value(kind: type, key: jax.Array, i: int) -> nnx.Variable:
    value = jax.random.fold_in(key, i) if issubclass(kind, nnx.RngKey) else jax.numpy.uint32(0)
    return kind(value)


@functools.lru_cache(maxsize=4096)
def _template(description: ModuleLayer) -> Template:
    """Built abstractly: no array of the module ever exists."""
    module = nnx.eval_shape(lambda: description.build(jax.random.key(0)))
    norms = batch_norm.prepare(module, str(description))
    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    train, params, stats, rng_state, rest = nnx.split(module, *kinds)
    unknown = nnx.to_flat_state(rest)
    if unknown:
        found = ", ".join(sorted({type(v).__name__ for _, v in unknown}))
        raise ValueError(
            f"layer {description} has variables of type {found}; a pipeline layer may hold "
            f"nnx.Param, random streams, and the statistics of nnx.BatchNorm only"
        )
    module.eval()
    evaluate = nnx.split(module, nnx.Param, ...)[0]
    flat = tuple((path, type(variable)) for path, variable in nnx.to_flat_state(rng_state))
    pure_params, pure_stats = (nnx.to_pure_dict(state) for state in (params, stats))
    return Template(pure_params, pure_stats, train, evaluate, flat, norms)


def check_counts(**counts: int) -> None:
    """Raise ValueError unless each of a network's numbers is a whole number of at least one."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1")


@functools.lru_cache(maxsize=4096)
def _takes(function: Callable, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters
