"""List the cells of an interpreted network, and group their parameters for loops over cells.

A network of N = 3 has these cells; `positions` lists them in this order:

    stem   first normal normal   reduction   normal normal normal   reduction   normal normal normal
           `----- stack 0 ---'               `---- stack 1 -----'               `---- stack 2 -----'

The first cell is apart, because it reads the stem. The normal cells of a stack have equal shapes,
and one loop computes them all. So the tree of parameters, or of statistics, is

    {"first": cell, "stacks": (stack, stack, stack), "reductions": (cell, cell)}

A cell is {"enter", "match", "body"}; the first one has no match. A stack has the same names, and
arrays with a leading axis over its cells. The match of its first cell is apart, as "start", because
it reads a buffer of another shape than the matches of the others.
"""

from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from gpipe_jax.genotypes.genotype import INPUTS
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from nas.training.interpreter.cell import STEM_STATES, CellBody, CellKind
from nas.training.interpreter.inputs import InputProjection

OutputKind = Literal["stem", "normal", "reduction"]
C = TypeVar("C", covariant=True)


class CellPair(Protocol[C]):
    """Hold one value for normal and one for reduction cells, as `Genotype` and `Encoding` do."""

    @property
    def normal(self) -> C:
        """Return the value for normal cells."""
        ...

    @property
    def reduction(self) -> C:
        """Return the value for reduction cells."""
        ...


class HasConcat(Protocol[C]):
    """Say which states are concatenated, as a genotype's cell and its encoding do."""

    @property
    def concat(self) -> C:
        """Return the states of the output."""
        ...


class Projection(NamedTuple):
    """Describe a layer of a cell that reads another output."""

    name: Literal["enter", "match"]
    layer: InputProjection
    source: OutputKind  # which kind of output it reads


class CellPosition(NamedTuple):
    """Describe one cell of a network: its layers, and whose outputs they read."""

    kind: CellKind
    body: CellBody
    enter: InputProjection  # makes state 0 from the output of the cell before
    match: InputProjection | None  # makes state 1 from the one before that; none in the first cell
    enter_source: OutputKind
    match_source: OutputKind

    def own(self, cells: CellPair[C]) -> C:
        """Return the value for this cell."""
        return cells.reduction if self.kind == "reduction" else cells.normal

    def projections(self) -> list[Projection]:
        """Return the projections that the cell has."""
        projections = [Projection("enter", self.enter, self.enter_source)]
        if self.match is not None:
            projections.append(Projection("match", self.match, self.match_source))
        return projections


class _Output(NamedTuple):
    """Describe the output of a cell, or of the stem."""

    source: OutputKind
    features: int  # of each state
    states: int


def cell_positions(
    cells_per_stack: int,
    filters: int,
    operations: tuple[str, ...],
    pairs: int,
    norm: Normalization,
) -> list[CellPosition]:
    """Return the positions of all cells in their order."""
    stack: list[CellKind] = ["normal"] * cells_per_stack
    kinds: list[CellKind] = ["first", *stack[1:], "reduction", *stack, "reduction", *stack]
    last = before_last = _Output("stem", filters, STEM_STATES)
    positions, features = [], filters
    previous_kind = None
    for kind in kinds:
        if kind == "reduction":
            features = 2 * features
        enter = InputProjection(last.states, last.features, features, norm)
        match = None
        if kind != "first":
            halve = previous_kind == "reduction"  # the output before that has twice the resolution
            optional = not halve and before_last.source != "stem"
            match = InputProjection(
                before_last.states, before_last.features, features, norm, halve, optional
            )
        body = CellBody(kind, operations, pairs, features, norm)
        positions.append(CellPosition(kind, body, enter, match, last.source, before_last.source))
        source: OutputKind = "reduction" if kind == "reduction" else "normal"
        last, before_last = _Output(source, features, INPUTS + pairs), last
        previous_kind = kind
    return positions


def source_concat(cells: CellPair[HasConcat[C]], source: OutputKind, stem: C) -> C:
    """Return which states an output of this kind concatenates; `stem` is the stem's answer."""
    if source == "stem":
        return stem
    return cells.reduction.concat if source == "reduction" else cells.normal.concat


# --- the tree of parameters, or of statistics -----------------------------------------------------


class CellGroups(NamedTuple):
    """Hold one item for each cell, in the groups that a network computes one after the other."""

    first: Any
    stacks: tuple[list, ...]  # three lists, of normal cells
    reductions: list  # two


def group_cells(positions: list[CellPosition], items: list) -> CellGroups:
    """Group items that are given in the order of the cells."""
    stacks: list[list] = [[]]
    reductions = []
    first, *others = zip(positions, items, strict=True)
    for position, item in others:
        if position.kind == "reduction":
            reductions.append(item)
            stacks.append([])
        else:
            stacks[-1].append(item)
    return CellGroups(first[1], tuple(stacks), reductions)


def join_cells(positions: list[CellPosition], cells: list[PyTree]) -> PyTree:
    """Return the tree of a network from {"enter", "match", "body"} of each cell."""
    groups = group_cells(positions, cells)
    return {
        "first": groups.first,
        "stacks": tuple(map(_join_stack, groups.stacks)),
        "reductions": tuple(groups.reductions),
    }


def _join_stack(cells: list[PyTree]) -> PyTree:
    if not cells:
        return {}
    stack = {name: stack_trees([cell[name] for cell in cells]) for name in ("enter", "body")}
    if len(cells) > 1:
        stack["match"] = stack_trees([cell["match"] for cell in cells[1:]])
    return {**stack, "start": cells[0]["match"]}


def split_cells(positions: list[CellPosition], tree: PyTree) -> list[PyTree]:
    """Return {"enter", "match", "body"} of each cell from the tree of a network."""
    lengths = map(len, group_cells(positions, positions).stacks)
    first_stack, *stacks = map(_split_stack, tree["stacks"], lengths)
    cells = [tree["first"], *first_stack]
    for reduction, stack in zip(tree["reductions"], stacks, strict=True):
        cells += [reduction, *stack]
    return cells


def _split_stack(stack: PyTree, length: int) -> list[PyTree]:
    cells = []
    for k in range(length):
        cell = {name: _element(stack[name], k) for name in ("enter", "body")}
        cell["match"] = stack["start"] if k == 0 else _element(stack["match"], k - 1)
        cells.append(cell)
    return cells


def stack_trees(trees: list[PyTree]) -> PyTree:
    """Stack the arrays of equal trees along a new first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _element(tree: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda a: a[i], tree)
