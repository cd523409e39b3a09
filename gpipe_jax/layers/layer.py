"""Describe layers: values that say how to make parameters and how to apply them.

A network is a sequence of layers. Each layer takes one pytree and returns one pytree.
`layer(Module, **kwargs)` only *describes* a `flax.nnx.Module`; the module is built under tracing.
Descriptions are compared by value, so equal layers are recognized and share one compiled body.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from flax import linen, nnx

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import arguments, batch_norm, constants
from gpipe_jax.layers.arguments import brief
from gpipe_jax.layers.constants import Constant, UnfitModuleError
from gpipe_jax.layers.numeric_settings import cached_by_settings
from gpipe_jax.utils.trees import PyTree, first_without_type


@dataclass(frozen=True)
class Context:
    """Describe one call of a layer: one micro-batch of one step."""

    key: jax.Array  # of this layer, micro-batch and step: the only source of randomness
    train: bool  # False in evaluation
    progress: jax.Array | float = 1.0  # fraction of the training run that is done, 0 to 1


@dataclass(frozen=True)
class Layer:
    """Describe a layer of a network; make one with `layer`.

    Layers are values: they compare equal if they are built from equal arguments, and every method
    below returns a new one. To define a kind of layer of your own, subclass it and override `init`
    and `apply`.

    Args:
        stashes: Names of the tensors that the layer stashes; set by `stash`. Default: none.
        pops: Names of the tensors that the layer pops; set by `pop`. Default: none.
        ties: Pairs (path, name) of the layer's tied parameters; set by `tie`. Default: none.

    Example::

        down = gpipe.layer(Down, halvings=1).stash("level 0")  # returns (y, skip)
        up = gpipe.layer(Up).pop("level 0")                    # takes (x, skip)
    """

    stashes: tuple[str, ...] = field(default=(), kw_only=True)
    pops: tuple[str, ...] = field(default=(), kw_only=True)
    ties: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)  # (path, name)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        """Make fresh parameters.

        Args:
            key: A random key of this layer.
            x: An input, or a tree of zeros like it.

        Returns:
            A tree of floating-point arrays.
        """
        raise NotImplementedError

    def init_statistics(self) -> PyTree:
        """Make fresh running statistics of batch norms.

        Returns:
            A tree of arrays; without leaves if the layer has no batch norm.
        """
        return {}

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree]:
        """Return the shapes of parameters and running statistics; nothing is computed.

        Args:
            x: An input, as arrays or `jax.ShapeDtypeStruct`s.

        Returns:
            Parameters and statistics, as trees of `jax.ShapeDtypeStruct`.
        """
        params = jax.eval_shape(lambda x: self.init(jax.random.key(0), x), x)
        return params, jax.eval_shape(self.init_statistics)

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        """Compute the output for one micro-batch.

        Args:
            params: The parameters, as `init` makes them.
            stats: The running statistics, as `init_statistics` makes them.
            x: The input; with `pop`, a tuple (x, *popped).
            context: The random key, whether this is training, and the progress of the run.

        Returns:
            The output (with `stash`, a tuple (y, *stashed)), and the moments of this micro-batch in
            the form of `stats`. The moments are empty in evaluation. The pipeline averages them
            over all micro-batches and passes the average to `commit`, once a step.
        """
        raise NotImplementedError

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        """Compute the running statistics after a step.

        Args:
            stats: The running statistics before the step.
            moments: The average moments of the step's micro-batches, in the form of `stats`.

        Returns:
            The new running statistics.
        """
        del moments
        return stats

    def stash(self, *names: str) -> Self:
        """Stash outputs of this layer, for a later layer to pop: a skip connection.

        The stashed tensors may cross any number of stages. No stage between computes with them.

        Args:
            *names: A name for each stashed tensor. A later layer must pop each name once.

        Returns:
            This layer, whose output is a tuple (y, *stashed): the next layer takes y.

        Example::

            start = gpipe.layer(BottleneckStart, in_features=64, features=64).stash("identity")
        """
        return replace(self, stashes=(*self.stashes, *names))

    def pop(self, *names: str) -> Self:
        """Take tensors that earlier layers stashed, beside the input.

        Args:
            *names: Names that earlier layers stashed.

        Returns:
            This layer, whose input is a tuple (x, *popped).

        Example::

            end = gpipe.layer(BottleneckEnd, in_features=64, features=256).pop("identity")
        """
        return replace(self, pops=(*self.pops, *names))

    def tie(self, name: str, path: str) -> Self:
        """Share a parameter with all other layers that tie the same name.

        The first of these layers makes the parameter, and its gradient is the sum over all of them.

        Args:
            name: The name of the shared parameter.
            path: The parameter's path in this layer, as "linear.kernel".

        Returns:
            This layer, with that parameter tied.

        Example::

            shape = {"vocabulary": 256, "width": 64}
            embedding = gpipe.layer(Embedding, length=32, **shape).tie("tokens", "tokens")
            head = gpipe.layer(TiedHead, **shape).tie("tokens", "tokens")
        """
        return replace(self, ties=(*self.ties, (path, name)))

    def linked(self, description: str) -> str:
        """Add the names of what is stashed, popped and tied to a description.

        Args:
            description: The layer without its links, as "Dense(features=4)".

        Returns:
            The description with these names, as "Dense(features=4) [stash x]".
        """
        ties = [f"{path} as {name}" for path, name in self.ties]
        links = {"stash": self.stashes, "pop": self.pops, "tie": ties}
        texts = [f"[{verb} {', '.join(names)}]" for verb, names in links.items() if names]
        return " ".join([description, *texts])


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
    if isinstance(target, type) and issubclass(target, nnx.Module):
        arguments.check_constructor(target, functions, kwargs)
        frozen = {name: _freeze(value) for name, value in kwargs.items()}
        types = _types(list(frozen.values()))
        description: Layer = ModuleLayer(target, tuple(sorted(frozen.items())), types)
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


def check_layers(layers: Any) -> None:
    """Raise ArgumentError unless `layers` is a sequence of layers."""
    if isinstance(layers, Layer):
        raise ArgumentError("layers", f"`layers` is one layer, {layers}; put it into a list")
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ArgumentError(
            "layers",
            f"`layers` must be a list of layers, got {arguments.kind(layers)}; divide a model into "
            f"layers, each made by gpipe_jax.layer",
        )
    for i, one in enumerate(layers):
        if not isinstance(one, Layer):
            raise ArgumentError(
                "layers",
                f"`layers[{i}]` must be a layer, as gpipe_jax.layer makes it, got "
                f"{arguments.kind(one)}; {arguments.remedy(one)}",
            )


def _freeze(value: Any) -> Any:
    if isinstance(value, np.generic):  # a number of NumPy makes the same layer as one of Python
        return value.item()
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _types(value: Any) -> tuple:
    """Return the types in `value`: 1, 1.0 and True are equal, but make different layers."""
    inner = tuple(map(_types, value)) if isinstance(value, list | tuple) else ()
    return (type(value).__name__, *inner)


_STATISTICS = "batch_stats"  # Linen's name for the running statistics of batch norms


@dataclass(frozen=True)
class FunctionLayer(Layer):
    """Describe a layer by two functions (init, apply)."""

    init_fn: Callable
    apply_fn: Callable

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        params = self.init_fn(key, x)
        if found := first_without_type(params):
            path, leaf = found
            raise UnfitModuleError(
                f"{self}: its `init` returns {leaf!r} of type {type(leaf).__name__} at "
                f"params{path}; parameters are arrays, so keep it in `apply`"
            )
        self._check_collections(params)
        return params

    def _check_collections(self, params: PyTree) -> None:
        """Refuse what Linen modules return beside parameters: a pipeline would train it."""
        if not isinstance(params, Mapping):
            return
        of_linen = isinstance(_owner(self.init_fn), linen.Module)
        others = [name for name in params if (of_linen and name != "params") or name == _STATISTICS]
        if others:
            raise UnfitModuleError(
                f"{self}: its `init` returns {', '.join(map(repr, others))}, but a pipeline "
                f"trains all that `init` returns; return 'params' only, and give constants to "
                f"`apply` yourself; for batch norm use an nnx module with nnx.BatchNorm, whose "
                f"running statistics a pipeline updates"
            )

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        del stats
        options = {
            "rngs": context.key if context.train else None,
            "train": context.train,
            "progress": context.progress,
        }
        taken = {name: value for name, value in options.items() if _takes(self.apply_fn, name)}
        return self.apply_fn(params, x, **taken), {}

    def __str__(self) -> str:
        owner, function = _owner(self.apply_fn), _function(self.apply_fn)
        name = getattr(function, "__name__", repr(function))
        return self.linked(name if owner is None else type(owner).__name__)


def _function(function: Callable) -> Callable:
    """Return the function that a `functools.partial` calls, or the function itself."""
    return function.func if isinstance(function, functools.partial) else function


def _owner(function: Callable) -> Any:
    """Return the Linen module whose `init` or `apply` this is, or None."""
    return getattr(_function(function), "__self__", None)


class Template(NamedTuple):
    """Hold the static half of a module: its graph in both modes, and the shapes of its arrays."""

    params: PyTree  # as `jax.ShapeDtypeStruct`s
    stats: PyTree  # likewise
    train: nnx.GraphDef
    evaluate: nnx.GraphDef
    rng_state: tuple[tuple[tuple, type], ...]  # paths and types of its random streams
    norms: tuple[batch_norm.Norm, ...]
    constants: Sequence[Constant]  # arrays that are not variables


@dataclass(frozen=True)
class ModuleLayer(Layer):
    """Describe a layer by an `nnx.Module` class and the arguments to build it with."""

    module: type[nnx.Module]
    kwargs: tuple[tuple[str, Any], ...]
    types: tuple  # of the arguments: layers with arguments 1 and True differ

    def build(self, key: jax.Array) -> nnx.Module:
        """Build the module, with all its parameters."""
        rngs = {"rngs": nnx.Rngs(key)} if _takes(self.module.__init__, "rngs") else {}
        return self.module(**dict(self.kwargs), **rngs)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        del x  # nnx modules know the shape of their input
        module = self.build(key)
        constants.take(module)
        return nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[1])

    def init_statistics(self) -> PyTree:
        return batch_norm.fresh(_template(self).stats)

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        return _template(self).params, _template(self).stats

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        template, key = _template(self), context.key
        streams = [
            (path, _stream_value(kind, key, i)) for i, (path, kind) in enumerate(template.rng_state)
        ]
        graph = template.train if context.train else template.evaluate
        rng_state = nnx.to_pure_dict(nnx.from_flat_state(streams))
        module = nnx.merge(graph, params, stats, rng_state)
        values = constants.put(module, template.constants)
        options = {"rngs": nnx.Rngs(key), "progress": context.progress}
        call = self.module.__call__
        y = module(x, **{name: value for name, value in options.items() if _takes(call, name)})
        constants.check_unchanged(module, template.constants, values)
        if not (context.train and template.norms):
            return y, {}
        batch_stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return y, batch_norm.moments(template.norms, stats, batch_stats)

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return batch_norm.commit(_template(self).norms, stats, moments)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={brief(value)}" for name, value in self.kwargs)
        return self.linked(f"{self.module.__name__}({arguments})")


def _stream_value(kind: type, key: jax.Array, i: int) -> nnx.Variable:
    value = jax.random.fold_in(key, i) if issubclass(kind, nnx.RngKey) else jax.numpy.uint32(0)
    return kind(value)


@cached_by_settings(maxsize=4096)
def _template(description: ModuleLayer) -> Template:
    """Build the module abstractly, without any array but constants, and split it."""
    taken = []

    def build() -> nnx.Module:
        module = description.build(jax.random.key(0))
        taken.extend(constants.take(module))
        return module

    module = nnx.eval_shape(build)
    values = constants.compute(description.build, str(description)) if taken else []
    norms = batch_norm.prepare(module, str(description))
    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    train, params, stats, rng_state, rest = nnx.split(module, *kinds)
    unknown = nnx.to_flat_state(rest)
    if unknown:
        types = ", ".join(sorted({type(v).__name__ for _, v in unknown}))
        raise UnfitModuleError(
            f"{description} has variables of type {types}; a pipeline layer may hold "
            f"nnx.Param, random streams, the statistics of nnx.BatchNorm, and constant arrays that "
            f"are plain attributes"
        )
    module.eval()
    evaluate = nnx.split(module, nnx.Param, ...)[0]
    flat = tuple((path, type(variable)) for path, variable in nnx.to_flat_state(rng_state))
    pure_params, pure_stats = (nnx.to_pure_dict(state) for state in (params, stats))
    return Template(pure_params, pure_stats, train, evaluate, flat, norms, values)


@functools.lru_cache(maxsize=4096)
def _takes(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # a function of C has no signature
        return False
