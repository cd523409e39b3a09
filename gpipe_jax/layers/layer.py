"""Describe layers: values that say how to make parameters and how to apply them.

A network is a sequence of layers. Each layer takes one pytree and returns one pytree.
`layer(Module, **kwargs)` only *describes* a `flax.nnx.Module`; the module is built under tracing.
Descriptions are compared by value, so equal layers are recognized and share one compiled body.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.sources import arguments
from gpipe_jax.utils.trees import PyTree


@dataclass(frozen=True)
class Context:
    """Describe one call of a layer: one micro-batch of one step."""

    key: jax.Array  # of this layer, micro-batch and step: the only source of randomness
    train: bool  # False in evaluation
    progress: jax.Array | float = 1.0  # fraction of the training run that is done, 0 to 1
    constants: PyTree = None  # what `Layer.init_constants` made; None: the layer makes them itself
    extras: Mapping[str, PyTree] = field(default_factory=dict)  # a layer gets those that it reads


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
        reads: Names of the batch's extras that the layer reads; set by `read`. Default: none.

    Example::

        down = gpipe.layer(Down, halvings=1).stash("level 0")  # returns (y, skip)
        up = gpipe.layer(Up).pop("level 0")                    # takes (x, skip)
    """

    stashes: tuple[str, ...] = field(default=(), kw_only=True)
    pops: tuple[str, ...] = field(default=(), kw_only=True)
    ties: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)  # (path, name)
    reads: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def has_values(self) -> bool:
        """Return whether the layer starts with values of its own, whatever the key."""
        return False

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        """Make fresh parameters.

        Args:
            key: A random key of this layer.
            x: An input, or a tree of zeros like it.
            **extras: The extras that the layer reads, or zeros like them.

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

    def init_constants(self) -> PyTree:
        """Make the constants: arrays that are not trained, such as tables and masks.

        They are equal for every seed. `apply` finds them in `context.constants`.

        Returns:
            A tree of arrays; without leaves if the layer has no constants.
        """
        return {}

    def shapes(self, x: PyTree, **extras: PyTree) -> tuple[PyTree, PyTree]:
        """Return the shapes of parameters and running statistics; nothing is computed.

        Args:
            x: An input, as arrays or `jax.ShapeDtypeStruct`s.
            **extras: The extras that the layer reads, likewise.

        Returns:
            Parameters and statistics, as trees of `jax.ShapeDtypeStruct`.
        """
        init = functools.partial(self.init, jax.random.key(0))
        params = jax.eval_shape(lambda x, extras: init(x, **extras), x, extras)
        return params, jax.eval_shape(self.init_statistics)

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        """Compute the output for one micro-batch.

        Args:
            params: The parameters, as `init` makes them.
            stats: The running statistics, as `init_statistics` makes them.
            x: The input; with `pop`, a tuple (x, *popped).
            context: The random key, whether this is training, the progress of the run, and the
                extras that the layer reads.

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
        _check_names("stash", names)
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
        _check_names("pop", names)
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

    def read(self, *names: str) -> Self:
        """Read extras of the batch beside the input, such as an attention mask.

        The extras of a batch are `batch["extras"]`, a dict of trees whose first axis is the
        examples. Each device takes those of its micro-batch; they pass no boundary of stages.

        Args:
            *names: Names of extras. A module or function gets each as a keyword of that name.

        Returns:
            This layer, which is called as `module(x, name=extra)`.

        Example::

            def apply(params, x, *, mask):
                return x * mask

            masked = gpipe.layer(lambda key, x: {}, apply).read("mask")
        """
        _check_names("read", names)
        return replace(self, reads=(*self.reads, *names))

    def name_in_model(self, path: str) -> str | None:
        """Return the name that a parameter has in the model of `from_module`.

        Args:
            path: The parameter's path in this layer, as "linear.kernel".

        Returns:
            The name, as "blocks.2.linear.kernel"; None if the layer is of no model.
        """
        del path
        return None

    def linked(self, description: str) -> str:
        """Add the names of what is stashed, popped, tied and read to a description.

        Args:
            description: The layer without its links, as "Dense(features=4)".

        Returns:
            The description with these names, as "Dense(features=4) [stash x]".
        """
        ties = [f"{path} as {name}" for path, name in self.ties]
        links = {"stash": self.stashes, "pop": self.pops, "tie": ties, "read": self.reads}
        texts = [f"[{verb} {', '.join(names)}]" for verb, names in links.items() if names]
        return " ".join([description, *texts])


def _check_names(method: str, names: tuple) -> None:
    """Raise TypeError unless all names are texts."""
    for name in names:
        if not isinstance(name, str):
            inner = name if isinstance(name, list | tuple) else ["mask"]
            raise TypeError(
                f"{method}() takes names, each as an argument of its own, got {name!r}; write "
                f".{method}({', '.join(map(repr, inner))})"
            )


def check_layers(layers: Any) -> None:
    """Raise ArgumentError unless `layers` is a sequence of layers."""
    if isinstance(layers, Layer):
        raise ArgumentError("layers", f"`layers` is one layer, {layers}; put it into a list")
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise ArgumentError(
            "layers",
            f"`layers` must be a list of layers, got {arguments.kind(layers)}; divide a model into "
            f"layers by gpipe_jax.from_module, or make each by gpipe_jax.layer",
        )
    for i, one in enumerate(layers):
        if not isinstance(one, Layer):
            raise ArgumentError(
                "layers",
                f"`layers[{i}]` must be a layer, as gpipe_jax.layer makes it, got "
                f"{arguments.kind(one)}; {arguments.remedy(one)}",
            )
