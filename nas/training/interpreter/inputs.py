"""Make states 0 and 1 of an interpreted cell from the outputs of earlier cells.

The output of a cell is the buffer of all its states, [S, B, H, W, C]. Its `Concat` says which of
them are concatenated, and so which ones a later cell reads.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from nas.training.interpreter.encoding import Concat
from nas.training.interpreter.operation_union import apply_layer
from nas.training.interpreter.parameter_table import ParameterTable, layer_tables, masked
from nas.training.interpreter.projection import element, project
from nas.training.interpreter.switch import switch


class ProjectionNorm(nnx.Module):
    """Apply a batch norm, which computes in float32 at least."""

    def __init__(self, features: int, *, norm: Normalization, rngs: nnx.Rngs) -> None:
        self.norm = norm.make(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x [B, H, W, features] and keep its type."""
        return self.norm(x).astype(x.dtype)


@dataclass(frozen=True)
class InputProjection:
    """Make one input state from a buffer: concatenate, relu, 1x1 convolution and batch norm.

    `AmoebaCell` has the same layers under the names `enter` (state 0) and `match` (state 1).
    """

    states: int  # in the buffer that is read
    in_features: int  # of each of them
    features: int  # of the input state
    norm: Normalization
    halve: bool = False  # halve the resolution
    optional: bool = False  # pass a concatenation through that is as wide as the state already

    @property
    def layer(self) -> Layer:
        """Return the batch norm."""
        return layer(ProjectionNorm, features=self.features, norm=self.norm)

    def __call__(
        self,
        concat: Concat,
        parameters: PyTree,
        statistics: PyTree,
        states: jax.Array,
        *,
        train: bool,
        needed: bool | jax.Array = True,
    ) -> tuple[jax.Array, PyTree]:
        """Return the input state, and the statistics after this call.

        If the projection is `optional` and not `needed`, the state is zero and costs nothing.
        """
        project_states = functools.partial(_project, self.layer, train)
        if not self.optional:
            return project_states(concat, parameters, statistics, states)
        branches = (
            project_states,
            functools.partial(_pass_through, self.features),
            _zero(self.features),
        )
        branch = jnp.where(needed, jnp.where(self.passes_through(concat), 1, 0), 2)
        return switch(branches, branch, concat, parameters, statistics, states)

    def passes_through(self, concat: Concat) -> Any:
        """Return whether the concatenation itself is the input state."""
        return self.optional & (concat.count * self.in_features == self.features)

    def tables(self, concat: Concat) -> tuple[PyTree, PyTree]:
        """Describe the elements of its parameters and statistics."""
        halves = {"even": self.features // 2, "odd": self.features - self.features // 2}
        widths = halves if self.halve else {"kernel": self.features}
        is_projected = jnp.logical_not(self.passes_through(concat))
        kernels = {}
        for name, width in widths.items():
            of_state = layer_tables({name: np.zeros((1, 1, self.in_features, width))})[name]
            of_states = ParameterTable(*(np.repeat(a[0], self.states, 0) for a in of_state))
            kernels[name] = of_states.masked(concat.members() & is_projected)
        parameters, statistics = (
            masked(layer_tables(shapes), is_projected) for shapes in self.layer.shapes(None)
        )
        return {**kernels, **parameters}, statistics


def _project(
    norm: Layer, train: bool, concat: Concat, parameters: PyTree, statistics: PyTree, states: Any
) -> tuple[jax.Array, PyTree]:
    kernels = {name: a for name, a in parameters.items() if name != "norm"}
    y = project(concat, kernels, states)
    return apply_layer(norm, {"norm": parameters["norm"]}, statistics, y, train=train)


def _pass_through(
    features: int, concat: Concat, parameters: PyTree, statistics: PyTree, states: jax.Array
) -> tuple[jax.Array, PyTree]:
    del parameters
    count = min(max(1, features // states.shape[-1]), len(states))
    y = jnp.concatenate([element(states, jnp.asarray(concat.order)[k]) for k in range(count)], -1)
    # Where no number of states makes up the width, this branch is never taken; its result must
    # have the shape all the same.
    missing = features - y.shape[-1]
    padding = [(0, 0, 0)] * 3 + [(0, missing, 0)]
    return jax.lax.pad(y, jnp.zeros((), y.dtype), padding), statistics


@functools.cache  # one object for all calls, so that JAX traces it once
def _zero(features: int) -> Any:
    def zero(concat: Any, parameters: Any, statistics: PyTree, states: jax.Array) -> tuple:
        del concat, parameters
        return jnp.zeros((*states.shape[1:-1], features), states.dtype), statistics

    return zero
