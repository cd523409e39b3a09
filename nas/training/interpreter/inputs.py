"""How an interpreted cell gets its states 0 and 1: from the buffers of earlier cells.

A cell's output is the buffer of all its states [S, B, H, W, C]; whoever reads it is told which of
them are concatenated.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpipe_jax.layers.layer import Layer, layer
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from nas.training.interpreter.encoding import Concat
from nas.training.interpreter.operation_union import call
from nas.training.interpreter.parameter_table import Entries, entries, masked
from nas.training.interpreter.projection import at, project
from nas.training.interpreter.switch import switch


class Norm(nnx.Module):
    """A batch norm, in float32 at least."""

    def __init__(self, features: int, *, norm: Normalization, rngs: nnx.Rngs) -> None:
        self.norm = norm.make(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of x [B, H, W, features]."""
        return self.norm(x).astype(x.dtype)


@dataclass(frozen=True)
class InputReader:
    """relu, 1x1 convolution and batch norm of a concatenation: a state of `features`.

    With `halve` at half the resolution. If it is `optional` it leaves out what a match leaves out:
    where the concatenation is as wide as the state already, that is it.
    """

    states: int  # of the buffer
    in_features: int  # of each of them
    features: int
    norm: Normalization
    halve: bool = False
    optional: bool = False

    @property
    def layer(self) -> Layer:
        """The batch norm."""
        return layer(Norm, features=self.features, norm=self.norm)

    def __call__(
        self,
        concat: Concat,
        parameters: PyTree,
        statistics: PyTree,
        states: jax.Array,
        *,
        train: bool,
        wanted: bool | jax.Array = True,
    ) -> tuple[jax.Array, PyTree]:
        """The state, or zero if it is not `wanted`; and the statistics after that."""
        project = functools.partial(_project, self.layer, train)
        if not self.optional:
            return project(concat, parameters, statistics, states)
        branches = (project, functools.partial(_pass, self.features), _nothing(self.features))
        case = jnp.where(wanted, jnp.where(self.passes(concat), 1, 0), 2)
        return switch(branches, case, concat, parameters, statistics, states)

    def passes(self, concat: Concat) -> Any:
        """Whether the concatenation itself is the state."""
        return self.optional & (concat.count * self.in_features == self.features)

    def entries(self, concat: Concat) -> tuple[PyTree, PyTree]:
        """What its parameters and statistics are."""
        halves = {"even": self.features // 2, "odd": self.features - self.features // 2}
        widths = halves if self.halve else {"kernel": self.features}
        made = jnp.logical_not(self.passes(concat))
        kernels = {}
        for name, width in widths.items():
            one = entries({name: np.zeros((1, 1, self.in_features, width))})[name]
            each = Entries(*(np.repeat(a[0], self.states, 0) for a in one))
            kernels[name] = each.masked(concat.members() & made)
        parameters, statistics = (masked(entries(tree), made) for tree in self.layer.shapes(None))
        return {**kernels, **parameters}, statistics


def _project(
    norm: Layer, train: bool, concat: Concat, parameters: PyTree, statistics: PyTree, states: Any
) -> tuple[jax.Array, PyTree]:
    kernels = {name: a for name, a in parameters.items() if name != "norm"}
    y = project(concat, kernels, states)
    return call(norm, {"norm": parameters["norm"]}, statistics, y, train=train)


def _pass(
    features: int, concat: Concat, parameters: PyTree, statistics: PyTree, states: jax.Array
) -> tuple[jax.Array, PyTree]:
    del parameters
    count = max(1, features // states.shape[-1])
    parts = [at(states, jnp.asarray(concat.order)[k]) for k in range(min(count, len(states)))]
    y = jnp.concatenate(parts, -1)
    # Where the widths can't agree this branch is never taken, but must have the shape.
    room = features - y.shape[-1]
    return jax.lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0)] * 3 + [(0, room, 0)]), statistics


@functools.cache
def _nothing(features: int) -> Any:
    def nothing(code: Any, parameters: Any, statistics: PyTree, states: jax.Array) -> tuple:
        del code, parameters
        return jnp.zeros((*states.shape[1:-1], features), states.dtype), statistics

    return nothing
