"""Run all networks of a cell space by one program: the architecture is data.

The networks are those of `Static` with the stem "cifar". `Static` writes the cells of an
architecture down one by one. Here each kind of cell is written once, and loops go over the slots of
a cell and over the cells of a stack. So a search compiles once, whatever it proposes. A step takes
about as long as that of the architecture's own program, because only what is chosen is computed.

    images -> stem -> first, stack 0 -> reduction -> stack 1 -> reduction -> stack 2 -> classifier
                      (N cells)                      (N cells)               (N cells)

A reduction cell halves the resolution and doubles the features. Every cell reads the two outputs
before it, and two projections make its states 0 and 1 from them:

    output of cell i - 2  -- match -->  state 1  --.
                                                   +-->  pairs  -->  output of cell i
    output of cell i - 1  -- enter -->  state 0  --'

Two cells differ. The first one takes the stem's output as state 1, as it is. The cell after it
reads the stem as "the output before that".

A stack is one `lax.scan` over its normal cells (the first cell of the network is not among them).
Both "match" of cell i + 1 and "enter" of cell i read the output of cell i - 1, so cell i computes
both, and hands state 1 on:

    state 1 of cell i        (from cell i - 1; of the stack's first cell: from "start", before it)
    output of cell i - 1  -- enter of cell i      -->  state 0 of cell i      -->  output of cell i
                          -- match of cell i + 1  -->  state 1 of cell i + 1

The last cell of a stack computes no match: what follows, a reduction cell, has its own.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.genotypes.genotype import INPUTS, PAPER_OPERATIONS, Genotype
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import Classifier, Stem
from nas.training.interpreter import encoding as encodings
from nas.training.interpreter import parameter_table, structure
from nas.training.interpreter.cell import STEM_STATES
from nas.training.interpreter.encoding import Concat, Encoding
from nas.training.interpreter.operation_union import apply_layer
from nas.training.interpreter.parameter_table import ParameterTable
from nas.training.interpreter.structure import CellPosition
from nas.training.network import PyTree, Shape, Variables
from nas.training.static import Static


class Output(NamedTuple):
    """Hold the output of a cell: all states [S, B, H, W, F], and which are concatenated."""

    concat: Concat
    states: jax.Array


class LastOutputs(NamedTuple):
    """Hold the outputs of the last two cells."""

    last: Output
    before: Output


@dataclass(frozen=True)
class Interpreter:
    """Build one program for all architectures with `pairs` pairs of these `operations`.

    Parameters are a dict with "stem", "classifier", and the cells as in `structure`.
    `translation` converts them to the form that `Static` has.
    """

    shape: Shape
    operations: tuple[str, ...] = PAPER_OPERATIONS
    pairs: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        if self.shape.stem != "cifar":
            raise ValueError(
                f"`stem` is {self.shape.stem!r}, but the interpreter knows only 'cifar'; use that"
            )

    def encode(self, genotype: Genotype) -> Encoding:
        """Encode a genotype as integer arrays.

        Raises:
            ValueError: It has other operations or another number of pairs, or no such network can
                be built.
        """
        Static(self.shape).encode(genotype)  # for its errors
        return encodings.encode(genotype, self.operations, self.pairs)

    # --- layers -----------------------------------------------------------------------------------

    @functools.cached_property
    def stem(self) -> Layer:
        """Return the layer that turns images into features."""
        return layer(
            Stem,
            in_features=self.shape.channels,
            features=STEM_STATES * self.shape.filters,
            dtype=self.shape.dtype,
            norm=Normalization(self.shape.batch_norm_momentum),
            stride=1,
            padding="SAME",
        )

    @functools.cached_property
    def positions(self) -> list[CellPosition]:
        """Return the cells in their order."""
        return structure.cell_positions(
            self.shape.cells_per_stack,
            self.shape.filters,
            self.operations,
            self.pairs,
            Normalization(self.shape.batch_norm_momentum),
        )

    @functools.cached_property
    def classifier(self) -> Layer:
        """Return the layer that turns all states of the last cell into scores."""
        width = (INPUTS + self.pairs) * self.positions[-1].body.features
        return layer(Classifier, in_features=width, classes=self.shape.classes)

    def tables(self, architecture: Encoding) -> tuple[PyTree, PyTree]:
        """Describe the elements of the network's parameters and statistics."""
        cells = [_cell_tables(position, architecture) for position in self.positions]
        parameters, statistics = (
            structure.join_cells(self.positions, list(of_cells))
            for of_cells in zip(*cells, strict=True)
        )
        for name, part in (("stem", self.stem), ("classifier", self.classifier)):
            parameters[name], statistics[name] = map(
                parameter_table.layer_tables, part.shapes(None)
            )
        linear, states = parameters["classifier"]["linear"], INPUTS + self.pairs
        by_state = [a.reshape(states, -1, a.shape[-1]) for a in linear["kernel"]]
        linear["kernel"] = ParameterTable(*by_state).masked(architecture.normal.concat.members())
        return parameters, statistics

    # --- the protocol `Network` -------------------------------------------------------------------

    def init(self, architecture: Encoding, key: jax.Array) -> Variables:
        """Draw initial values, distributed as those of `Static`, and zero for padding."""
        parameters, statistics = self.tables(architecture)
        return Variables(parameter_table.draw(parameters, key), parameter_table.starts(statistics))

    def used(self, architecture: Encoding) -> PyTree:
        """Return 1 for each parameter that the network uses, 0 for padding."""
        return parameter_table.used(self.tables(architecture)[0])

    def apply(
        self, architecture: Encoding, values: Variables, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Return scores [B, classes] of images [B, H, W, C], and the new statistics."""
        stem = _select(values, "stem")
        x, stem_statistics = apply_layer(self.stem, *stem, images, train=train)
        output, cell_statistics = self._cells(architecture, values, x, train)
        scores, classifier_statistics = self._classify(_select(values, "classifier"), output)
        return scores, {
            **cell_statistics,
            "stem": stem_statistics,
            "classifier": classifier_statistics,
        }

    def _cells(
        self, architecture: Encoding, values: Variables, x: jax.Array, train: bool
    ) -> tuple[Output, PyTree]:
        """Return the output of the last cell from that of the stem, and the new statistics."""
        cells = structure.group_cells(self.positions, self.positions)
        stem = Output(encodings.all_states(STEM_STATES), jnp.stack(jnp.split(x, STEM_STATES, -1)))
        output, first = _run_first(
            cells.first, architecture, _select(values, "first"), stem, x, train
        )
        outputs = LastOutputs(output, stem)
        stacks, reductions = [], []  # statistics
        for k, stack in enumerate(cells.stacks):
            if k > 0:
                reduction = _select(values, "reductions", k - 1)
                outputs, updated = _run_reduction(
                    cells.reductions[k - 1], architecture, reduction, outputs, train
                )
                reductions.append(updated)
            updated = {}
            if stack:
                stack_values = _select(values, "stacks", k)
                outputs, updated = _run_stack(stack, architecture, stack_values, outputs, train)
            stacks.append(updated)
        return outputs.last, {
            "first": first,
            "stacks": tuple(stacks),
            "reductions": tuple(reductions),
        }

    def _classify(self, values: Variables, output: Output) -> tuple[jax.Array, PyTree]:
        linear = values.parameters["linear"]
        kernel = linear["kernel"].reshape(-1, self.shape.classes)
        is_member = output.concat.members()[:, None, None, None, None]
        x = jnp.concatenate(list(jnp.where(is_member, output.states, 0)), -1)
        parameters = {"linear": {**linear, "kernel": kernel}}
        # A layer after the stem reads (x, skip), of which the classifier takes x.
        return apply_layer(self.classifier, parameters, values.statistics, (x, x), train=False)

    def inherit(
        self, child: Encoding, parent: Encoding, fresh: Variables, trained: Variables
    ) -> Variables:
        """Return the parent's weights where child and parent agree, else fresh values.

        They agree on an element that both use. In a slot the operations must have parameters of
        equal shapes too. A projection inherits the rows of the states that both concatenate.
        """
        ours, theirs = self.tables(child), self.tables(parent)
        is_shared = [parameter_table.shared(*pair) for pair in zip(ours, theirs, strict=True)]
        return Variables(
            *(
                jax.tree.map(lambda keep, new, old: jnp.where(keep, old, new), *trees)
                for trees in zip(is_shared, fresh, trained, strict=True)
            )
        )


def _select(values: Variables, *path: str | int) -> Variables:
    """Return the parameters and statistics at this path of their trees."""
    parameters, statistics = values
    for key in path:
        parameters, statistics = parameters[key], statistics[key]
    return Variables(parameters, statistics)


def _cell_tables(position: CellPosition, encoding: Encoding) -> tuple[PyTree, PyTree]:
    tables = {"body": position.body.tables(position.own(encoding))}
    for name, projection, source in position.projections():
        concat = structure.source_concat(encoding, source, stem=encodings.all_states(STEM_STATES))
        tables[name] = projection.tables(concat)
    parameters = {name: of_parameters for name, (of_parameters, _) in tables.items()}
    statistics = {name: of_statistics for name, (_, of_statistics) in tables.items()}
    return parameters, statistics


def _run_first(
    position: CellPosition,
    encoding: Encoding,
    values: Variables,
    stem: Output,
    x: jax.Array,
    train: bool,
) -> tuple[Output, PyTree]:
    """Return the first cell's output and statistics; x is the stem's output, concatenated."""
    enter, body = _select(values, "enter"), _select(values, "body")
    state_0, enter_statistics = position.enter(stem.concat, *enter, stem.states, train=train)
    states, body_statistics = position.body(encoding.normal, *body, (state_0, x), train=train)
    statistics = {"enter": enter_statistics, "body": body_statistics}
    return Output(encoding.normal.concat, states), statistics


def _run_reduction(
    position: CellPosition,
    encoding: Encoding,
    values: Variables,
    outputs: LastOutputs,
    train: bool,
) -> tuple[LastOutputs, PyTree]:
    """Return the last two outputs after a reduction cell, and its statistics."""
    assert position.match is not None
    last, before = outputs
    enter, match, body = (_select(values, name) for name in ("enter", "match", "body"))
    state_0, enter_statistics = position.enter(last.concat, *enter, last.states, train=train)
    state_1, match_statistics = position.match(before.concat, *match, before.states, train=train)
    states, body_statistics = position.body(
        encoding.reduction, *body, (state_0, state_1), train=train
    )
    statistics = {"enter": enter_statistics, "match": match_statistics, "body": body_statistics}
    return LastOutputs(Output(encoding.reduction.concat, states), last), statistics


def _run_stack(
    stack: list[CellPosition],
    encoding: Encoding,
    values: Variables,
    outputs: LastOutputs,
    train: bool,
) -> tuple[LastOutputs, PyTree]:
    """Return the last two outputs after the normal cells of a stack, and their statistics."""
    last, before = outputs
    # Of the matches the first differs from the others, which are alike.
    start, match = stack[0].match, stack[-1].match
    enter, body, count = stack[0].enter, stack[0].body, len(stack)
    assert start is not None and match is not None
    state_1, start_statistics = start(
        before.concat, *_select(values, "start"), before.states, train=train
    )
    concats = [last.concat] + [encoding.normal.concat] * (count - 1)
    is_followed = np.arange(count) < count - 1  # by another cell of the stack

    def cell(carry: tuple, of_cell: tuple) -> tuple[tuple, PyTree]:
        (states, _, state_1), (concat, match_needed, *values) = carry, of_cell
        values = Variables(*values)
        state_0, updated_enter = enter(concat, *_select(values, "enter"), states, train=train)
        statistics = {"enter": updated_enter}
        output, statistics["body"] = body(
            encoding.normal, *_select(values, "body"), (state_0, state_1), train=train
        )
        if count > 1:
            state_1, statistics["match"] = match(
                concat, *_select(values, "match"), states, train=train, needed=match_needed
            )
        return (output, states, state_1), statistics

    of_cells = (structure.stack_trees(concats), is_followed, *map(_for_loop, values))
    carry = (last.states, last.states, state_1)
    (states, states_before, _), statistics = lax.scan(cell, carry, of_cells)
    if count > 1:
        statistics["match"] = jax.tree.map(lambda a: a[:-1], statistics["match"])
    outputs = LastOutputs(
        Output(encoding.normal.concat, states), Output(concats[-1], states_before)
    )
    return outputs, {**statistics, "start": start_statistics}


def _for_loop(stack: PyTree) -> PyTree:
    """Return the arrays of a stack with one element per cell; the last match is zero, unused."""

    def padded(a: jax.Array) -> jax.Array:
        return jnp.concatenate([a, jnp.zeros_like(a[:1])])

    arrays = {name: stack[name] for name in stack if name != "start"}
    if "match" in arrays:
        arrays["match"] = jax.tree.map(padded, arrays["match"])
    return arrays
