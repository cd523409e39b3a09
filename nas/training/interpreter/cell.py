"""What an interpreted cell does with its states 0 and 1: its pairs, and its output.

Both kinds of cells, and the network's first one, differ in the shapes of what their slots read.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.genotypes.genotype import INPUTS
from gpipe_jax.layers.layer import layer
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import ConvNorm, FactorizedReduction, Normalization
from nas.training.interpreter.encoding import CellCode, Concat
from nas.training.interpreter.operation_union import Operation, Union
from nas.training.interpreter.pairs import Steps, run_slots
from nas.training.interpreter.parameter_table import Entries
from nas.training.interpreter.switch import switch


@dataclass(frozen=True)
class Body:
    """The pairs of a cell, and its inputs as its output needs them.

    The first cell reads the stem's output as state 1, three times as wide; a reduction cell halves
    what its inputs' readers see.
    """

    kind: str
    operations: tuple[str, ...]
    pairs: int
    features: int
    norm: Normalization

    @property
    def groups(self) -> tuple[tuple[tuple[int, ...], int, int], ...]:
        """(states, features, stride) of states of equal shape; the last ones hold the pairs'."""
        made = tuple(range(INPUTS, INPUTS + self.pairs))
        return {
            "first": (((1,), 3 * self.features, 1), ((0, *made), self.features, 1)),
            "normal": (((0, 1, *made), self.features, 1),),
            "reduction": (((0, 1), self.features, 2), (made, self.features, 1)),
        }[self.kind]

    @functools.cached_property
    def union(self) -> Union:
        """Every operation for every group."""
        made = {"features": self.features, "norm": self.norm}
        return Union(
            tuple(
                layer(Operation, name=name, in_features=width, stride=stride, **made)
                for _, width, stride in self.groups
                for name in self.operations
            )
        )

    @functools.cached_property
    def matched(self) -> tuple[int, ...]:
        """The inputs that the output needs in another form."""
        return {"first": (1,), "normal": (), "reduction": (0, 1)}[self.kind]

    @functools.cached_property
    def output(self) -> Union:
        """How they are brought into it: not at all, or by this layer."""
        made = {"features": self.features, "relu": False, "norm": self.norm}
        if self.kind == "first":
            return Union((None, layer(ConvNorm, in_features=3 * self.features, **made)))
        return Union((None, layer(FactorizedReduction, in_features=self.features, **made)))

    def steps(self, code: CellCode) -> Steps:
        """What the slots do."""
        group, local = np.zeros((2, INPUTS + self.pairs), np.int32)
        for g, (states, _, _) in enumerate(self.groups):
            for place, state in enumerate(states):
                group[state], local[state] = g, place
        states = jnp.asarray(code.states)
        branch = jnp.asarray(group)[states] * len(self.operations) + code.operations
        target = np.repeat(local[INPUTS:], 2)
        return Steps(branch, jnp.asarray(local)[states], jnp.asarray(target))

    def member(self, concat: Concat) -> jax.Array:
        """Which of the inputs that are matched are in the output, [inputs]."""
        return concat.members()[np.array(self.matched)]

    def __call__(
        self,
        code: CellCode,
        parameters: PyTree,
        statistics: PyTree,
        inputs: tuple[jax.Array, jax.Array],
        *,
        train: bool,
    ) -> tuple[jax.Array, PyTree]:
        """All states [S, B, H, W, F] in the form of the output, and the statistics."""
        steps, p, s = self.steps(code), parameters["slots"], statistics["slots"]
        buffers = self._buffers(inputs)
        last, slots = run_slots(self.union, train, steps, p, s, buffers)  # pyright: ignore[reportGeneralTypeIssues]
        if self.kind == "normal":
            return last, {"slots": slots}
        matched, outputs = self._matched(
            code.concat, parameters["outputs"], statistics["outputs"], inputs, train
        )
        parts = [matched, last] if self.kind == "reduction" else [last[:1], matched, last[1:]]
        return jnp.concatenate(parts), {"slots": slots, "outputs": outputs}

    def _buffers(self, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """The groups, with zeros for what the pairs make."""
        batch, high, wide, _ = inputs[0].shape
        stride = 2 if self.kind == "reduction" else 1
        shape = (self.pairs, batch, -(-high // stride), -(-wide // stride), self.features)
        zeros = jnp.zeros(shape, inputs[0].dtype)
        if self.kind == "normal":
            return (jnp.concatenate([jnp.stack(inputs), zeros]),)
        if self.kind == "reduction":
            return jnp.stack(inputs), zeros
        return inputs[1][None], jnp.concatenate([inputs[0][None], zeros])

    def _matched(
        self,
        concat: Concat,
        parameters: jax.Array,
        statistics: jax.Array,
        inputs: tuple[jax.Array, jax.Array],
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        found, union, features = [], self.output, self.features
        stride = 2 if self.kind == "reduction" else 1
        branches = (_absent(features, stride), functools.partial(_present, union, train))
        for k, i in enumerate(self.matched):
            index = self.member(concat)[k].astype(jnp.int32)
            found.append(switch(branches, index, (), parameters[k], statistics[k], inputs[i]))
        states, after = zip(*found, strict=True)
        return jnp.stack(states), jnp.stack(after)

    def entries(self, code: CellCode) -> tuple[PyTree, PyTree]:
        """What its parameters and statistics are."""
        chosen = {"slots": (self.union, self.steps(code).branch)}
        if self.matched:
            chosen["outputs"] = (self.output, self.member(code.concat).astype(jnp.int32))
        tables = {name: (union.tables(), index) for name, (union, index) in chosen.items()}
        parameters, statistics = (
            {
                name: Entries(*(jnp.asarray(a)[index] for a in table[side]))
                for name, (table, index) in tables.items()
            }
            for side in (0, 1)
        )
        return parameters, statistics


@functools.cache
def _absent(features: int, stride: int) -> Any:
    def absent(code: Any, parameters: Any, statistics: jax.Array, x: jax.Array) -> tuple:
        del code, parameters
        batch, high, wide, _ = x.shape
        shape = (batch, -(-high // stride), -(-wide // stride), features)
        return jnp.zeros(shape, x.dtype), statistics

    return absent


def _present(
    union: Union, train: bool, code: Any, parameters: Any, statistics: Any, x: jax.Array
) -> tuple:
    del code
    return union.call(1, parameters, statistics, x, train=train)
