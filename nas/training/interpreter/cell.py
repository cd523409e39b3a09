"""Compute an interpreted cell from its states 0 and 1: the pairs, and the output.

There are three kinds of cells, which differ in the shapes of what their slots read:

    kind        state 0    state 1    states 2, 3, ...   changed for the output
    first       F          3 F        F                  state 1: a 1x1 convolution
    normal      F          F          F                  nothing
    reduction   F          F          F at half size     states 0 and 1: a factorized reduction

F is the number of features of the cell.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.genotypes.genotype import INPUTS
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import ConvNorm, FactorizedReduction, Normalization
from nas.training.interpreter.encoding import CellEncoding, Concat
from nas.training.interpreter.operation_union import Operation, OperationUnion
from nas.training.interpreter.pairs import SlotInstructions, run_slots
from nas.training.interpreter.parameter_table import ParameterTable
from nas.training.interpreter.switch import switch

CellKind = Literal["first", "normal", "reduction"]
STEM_STATES = 3
"""Width of the stem's output in states of the first cell."""


class StateGroup(NamedTuple):
    """Name states of equal shape; see `pairs`."""

    states: tuple[int, ...]
    features: int
    stride: int  # of the operations that read them


@dataclass(frozen=True)
class CellBody:
    """Compute all states of a cell in the form that its output needs.

    Operations on the inputs of a reduction cell have stride 2.
    """

    kind: CellKind
    operations: tuple[str, ...]
    pairs: int
    features: int
    norm: Normalization

    @property
    def stride(self) -> int:
        """Return the quotient of the resolutions of inputs and output."""
        return 2 if self.kind == "reduction" else 1

    @property
    def groups(self) -> tuple[StateGroup, ...]:
        """Return the groups of states; the last one holds the states that the pairs make."""
        F, pair_states = self.features, tuple(range(INPUTS, INPUTS + self.pairs))
        if self.kind == "first":
            return StateGroup((1,), STEM_STATES * F, 1), StateGroup((0, *pair_states), F, 1)
        if self.kind == "normal":
            return (StateGroup((0, 1, *pair_states), F, 1),)
        return StateGroup((0, 1), F, 2), StateGroup(pair_states, F, 1)

    @functools.cached_property
    def union(self) -> OperationUnion:
        """Return every operation for every group."""
        return OperationUnion(
            tuple(
                layer(
                    Operation,
                    name=name,
                    in_features=group.features,
                    stride=group.stride,
                    features=self.features,
                    norm=self.norm,
                )
                for group in self.groups
                for name in self.operations
            )
        )

    @functools.cached_property
    def changed_inputs(self) -> tuple[int, ...]:
        """Return the inputs that the output needs in another form."""
        return {"first": (1,), "normal": (), "reduction": (0, 1)}[self.kind]

    @functools.cached_property
    def output_union(self) -> OperationUnion:
        """Return the choice for a changed input: none if it is not in the output, or a layer."""
        same = {"features": self.features, "relu": False, "norm": self.norm}
        if self.kind == "first":
            change = layer(ConvNorm, in_features=STEM_STATES * self.features, **same)
        else:
            change = layer(FactorizedReduction, in_features=self.features, **same)
        return OperationUnion((None, change))

    def instructions(self, encoding: CellEncoding) -> SlotInstructions:
        """Return what the slots do in this cell."""
        group_of_state, index_in_group = np.zeros((2, INPUTS + self.pairs), np.int32)
        for g, group in enumerate(self.groups):
            for index, state in enumerate(group.states):
                group_of_state[state], index_in_group[state] = g, index
        states = jnp.asarray(encoding.states)
        group = jnp.asarray(group_of_state)[states]
        return SlotInstructions(
            branch=group * len(self.operations) + encoding.operations,
            source=jnp.asarray(index_in_group)[states],
            target=jnp.asarray(np.repeat(index_in_group[INPUTS:], 2)),
        )

    def changed_in_output(self, concat: Concat) -> jax.Array:
        """Return which of the changed inputs are in the output, bool [changed inputs]."""
        return concat.members()[np.array(self.changed_inputs)]

    def __call__(
        self,
        encoding: CellEncoding,
        parameters: PyTree,
        statistics: PyTree,
        inputs: tuple[jax.Array, jax.Array],
        *,
        train: bool,
    ) -> tuple[jax.Array, PyTree]:
        """Return all states [S, B, H, W, F] in the form of the output, and the new statistics."""
        last, slots = run_slots(  # pyright: ignore[reportGeneralTypeIssues]
            self.union,
            train,
            self.instructions(encoding),
            parameters["slots"],
            statistics["slots"],
            self._empty_groups(inputs),
        )
        if self.kind == "normal":
            return last, {"slots": slots}
        changed, outputs = self._change_inputs(
            encoding.concat, parameters["outputs"], statistics["outputs"], inputs, train
        )
        if self.kind == "reduction":
            states = jnp.concatenate([changed, last])
        else:  # state 0, state 1 changed, and the states of the pairs
            states = jnp.concatenate([last[:1], changed, last[1:]])
        return states, {"slots": slots, "outputs": outputs}

    def _empty_groups(self, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Return the groups with the inputs, and zeros for the states that the pairs make."""
        batch, height, width, _ = inputs[0].shape
        size = -(-height // self.stride), -(-width // self.stride)
        zeros = jnp.zeros((self.pairs, batch, *size, self.features), inputs[0].dtype)
        if self.kind == "normal":
            return (jnp.concatenate([jnp.stack(inputs), zeros]),)
        if self.kind == "reduction":
            return jnp.stack(inputs), zeros
        return inputs[1][None], jnp.concatenate([inputs[0][None], zeros])

    def _change_inputs(
        self,
        concat: Concat,
        parameters: jax.Array,
        statistics: jax.Array,
        inputs: tuple[jax.Array, jax.Array],
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the changed inputs, zero if they are not in the output, and the statistics."""
        branches = (
            _zero(self.features, self.stride),
            functools.partial(_change, self.output_union, train),
        )
        results = []
        for k, state in enumerate(self.changed_inputs):
            index = self.changed_in_output(concat)[k].astype(jnp.int32)
            results.append(switch(branches, index, (), parameters[k], statistics[k], inputs[state]))
        states, updated = zip(*results, strict=True)
        return jnp.stack(states), jnp.stack(updated)

    def tables(self, encoding: CellEncoding) -> tuple[PyTree, PyTree]:
        """Describe the elements of its parameters and statistics."""
        chosen = {"slots": (self.union, self.instructions(encoding).branch)}
        if self.changed_inputs:
            in_output = self.changed_in_output(encoding.concat).astype(jnp.int32)
            chosen["outputs"] = (self.output_union, in_output)
        tables = {name: (union.tables(), index) for name, (union, index) in chosen.items()}
        parameters = {name: _rows(pair[0], index) for name, (pair, index) in tables.items()}
        statistics = {name: _rows(pair[1], index) for name, (pair, index) in tables.items()}
        return parameters, statistics


def _rows(table: ParameterTable, index: jax.Array) -> ParameterTable:
    return ParameterTable(*(jnp.asarray(a)[index] for a in table))


@functools.cache  # one object for all calls, so that JAX traces it once
def _zero(features: int, stride: int) -> Any:
    def zero(integers: Any, parameters: Any, statistics: jax.Array, x: jax.Array) -> tuple:
        del integers, parameters
        batch, height, width, _ = x.shape
        shape = (batch, -(-height // stride), -(-width // stride), features)
        return jnp.zeros(shape, x.dtype), statistics

    return zero


def _change(
    union: OperationUnion,
    train: bool,
    integers: Any,
    parameters: Any,
    statistics: Any,
    x: jax.Array,
) -> tuple:
    del integers
    return union.apply(1, parameters, statistics, x, train=train)
