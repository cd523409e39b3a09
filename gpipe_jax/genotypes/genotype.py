"""Represent cells of the AmoebaNet search space as data: check, compare, store and draw them.

A network of this space repeats two cells, normal and reduction (Real et al. 2019,
https://arxiv.org/abs/1802.01548, "Search space"). A cell is a small graph of hidden states:

    state 0    the cell's direct input, the output of the cell before it
    state 1    its skip input, the output of the cell before that
    state 2+i  computed by pair i: op_a(state a) + op_b(state b), from earlier states a and b
    output     some of the states, concatenated over the channels
"""

import json
import operator
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gpipe_jax.genotypes import cell_drawing
from gpipe_jax.genotypes.cell_drawing import INPUTS, Element, Graph, Pair
from gpipe_jax.utils.text import did_you_mean_or_list

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from gpipe_jax.utils.graph_drawing import Picture

PAPER_OPERATIONS: tuple[str, ...] = (
    "identity",
    "sep_3x3",
    "sep_5x5",
    "sep_7x7",
    "avg_pool_3x3",
    "max_pool_3x3",
    "dil_sep_3x3",
    "conv_1x7_7x1",
)
"""The eight operations that the paper's search chooses from."""

OPERATIONS: tuple[str, ...] = (
    *PAPER_OPERATIONS,
    "conv_1x1",
    "conv_3x3",
    "max_pool_2x2",
    "dil_2_sep_5x5",
)
"""All operations: the paper's eight, and four more that AmoebaNet-B and D need."""


@dataclass(frozen=True)
class Cell:
    """Hold one cell, a graph of hidden states.

    Args:
        pairs: Pair i computes state 2 + i: `((operation, state), (operation, state))`. Lists become
            tuples.
        concat: The states that form the output.

    Raises:
        ValueError: This is not a cell; the message names the pair, the problem and the remedy.
    """

    pairs: tuple[Pair, ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        items = _items("pairs", self.pairs, "pairs of elements")
        pairs = tuple(_pair(i, pair) for i, pair in enumerate(items))
        if not pairs:
            raise ValueError(f"pairs is {items!r}, but a cell needs at least one pair: add one")
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "concat", _concat(self.concat, len(pairs)))

    @classmethod
    def from_pairs(cls, pairs: Sequence[Sequence[Element]]) -> "Cell":
        """Return the cell whose output is its unused states, the rule of the paper's search."""
        draft = cls(tuple(pairs), concat=(INPUTS,))  # type: ignore[arg-type]
        return replace(draft, concat=draft.unused())

    @property
    def states(self) -> int:
        """Return the number of hidden states, both inputs included."""
        return INPUTS + len(self.pairs)

    def unused(self) -> tuple[int, ...]:
        """Return the states that no pair reads; inputs count too, as in the paper."""
        read = {state for pair in self.pairs for _, state in pair}
        return tuple(state for state in range(self.states) if state not in read)

    def canonical(self) -> "Cell":
        """Return the one form that all cells with the same graph share, and no other cell.

        These keep the graph: another order of pairs, of the elements of a pair or of concat, and
        pairs that do not reach the output. Equal pairs stay apart, as each has its own parameters.
        """
        return _canonical(self)

    @property
    def graph(self) -> Graph:
        """Return the cell as its drawings take it."""
        return Graph(self.pairs, self.concat)

    def __str__(self) -> str:
        return cell_drawing.cell_text(self.graph)


@dataclass(frozen=True)
class Genotype:
    """Hold the two cells of a network.

    Args:
        normal: The cell that keeps the image size.
        reduction: The cell that halves it: its operations that read an input have stride 2.
        name: A name for people; equality and canonical forms ignore it. Default: "".

    Raises:
        ValueError: An argument has another type.

    Example:
        >>> pair = (("sep_3x3", 0), ("identity", 1))
        >>> cell = Cell.from_pairs([pair])
        >>> print(Genotype(normal=cell, reduction=cell).normal)
          h0 ── sep_3x3 ──┐
          h1 ── identity ─┴─ + ── h2 ──▶ output
          output = concat(h2)

    Source: Real et al. 2019, https://arxiv.org/abs/1802.01548, "Search space".
    """

    normal: Cell
    reduction: Cell
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for kind, cell in (("normal", self.normal), ("reduction", self.reduction)):
            if not isinstance(cell, Cell):
                raise ValueError(f"{kind} cell: expected a Cell, got {_short(cell)}: use Cell(...)")
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected a text, got {_short(self.name)}: correct it")

    def canonical(self) -> "Genotype":
        """Return the form, without a name, that all genotypes with the same two graphs share."""
        return Genotype(self.normal.canonical(), self.reduction.canonical())

    def to_json(self) -> str:
        """Return the genotype as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Genotype":
        """Read the genotype that `to_json` wrote.

        Args:
            text: One JSON object with the keys `normal` and `reduction`, and optionally `name`.

        Returns:
            The genotype.

        Raises:
            ValueError: The text is not a genotype; the message says what is wrong and where.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:  # nested too deep
            raise ValueError(f"genotype: not JSON ({error}): give what to_json returned") from error
        _check_keys("genotype", document, ("normal", "reduction"), ("name",))
        cells = {kind: _read_cell(kind, document[kind]) for kind in ("normal", "reduction")}
        return cls(**cells, name=document.get("name", ""))

    def __str__(self) -> str:
        return cell_drawing.text(self._graphs(), self.name)

    def _repr_html_(self) -> str:
        return cell_drawing.html(self._graphs(), self.name)

    def plot(self, path: "str | Path | None" = None) -> "Figure":
        """Draw both cells as graphs in a matplotlib figure.

        Args:
            path: The image file to write. None writes nothing. Default: None.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        return cell_drawing.figure(self._graphs(), self.name, path)

    def pictures(self, before: "Genotype | None" = None) -> "list[Picture]":
        """Lay out both cells; mark where they differ from those of the genotype `before`.

        Args:
            before: The genotype to compare with. None marks nothing. Default: None.

        Returns:
            The pictures of the normal and of the reduction cell.
        """
        return cell_drawing.pictures(self._graphs(), self.name, before and before._graphs())

    def differences(self, before: "Genotype") -> list[str]:
        """List what differs from the genotype `before`.

        Args:
            before: The genotype to compare with.

        Returns:
            A line for each difference, as `normal h4: sep_3x3(h1) → sep_3x3(h0)`.
        """
        return cell_drawing.differences(self._graphs(), before._graphs())

    def _graphs(self) -> dict[str, Graph]:
        return {"normal": self.normal.graph, "reduction": self.reduction.graph}


def is_json(text: str) -> bool:
    """Return whether a text is JSON, as `Genotype.to_json` writes it, and not a name or a path."""
    return text.lstrip().startswith("{")


def _short(value: object) -> str:
    return reprlib.repr(value)


def _items(place: str, value: Any, expected: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{place}: expected {expected}, got {_short(value)}: give a list or a tuple"
        )
    return tuple(value)


def _pair(i: int, value: Any) -> Pair:
    elements = _items(f"pair {i}", value, "two elements (operation, state)")
    if len(elements) != 2:
        raise ValueError(
            f"pair {i} has {len(elements)} elements: a pair sums two, give (operation, state) twice"
        )
    a, b = (_element(i, f"pair {i}, element {k}", item) for k, item in enumerate(elements))
    return a, b


def _element(i: int, place: str, value: Any) -> Element:
    items = _items(place, value, "(operation, state)")
    if len(items) != 2:
        raise ValueError(f"{place} has {len(items)} items: give two, (operation, state)")
    operation, state = items
    if operation not in OPERATIONS:
        suggestion = did_you_mean_or_list(str(operation), OPERATIONS)
        raise ValueError(f"{place}: unknown operation {_short(operation)}{suggestion}")
    state, computed = _state(place, state), INPUTS + i
    if not 0 <= state < computed:
        raise ValueError(
            f"{place} reads state {state}, but pair {i} computes state {computed} and can read "
            f"only earlier ones: use 0 to {computed - 1}"
        )
    return str(operation), state


def _state(place: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{place}: a state is a whole number, got {_short(value)}: give its index")
    return operator.index(value)


def _concat(value: Any, pairs: int) -> tuple[int, ...]:
    last = INPUTS + pairs - 1
    items = _items("concat", value, "the states that form the output")
    states = tuple(_state(f"concat[{k}]", state) for k, state in enumerate(items))
    for k, state in enumerate(states):
        if not 0 <= state <= last:
            raise ValueError(
                f"concat[{k}] is state {state}, but the last state is {last}: use 0 to {last}"
            )
        if states.index(state) < k:
            raise ValueError(
                f"concat[{k}] is state {state}, as is concat[{states.index(state)}]: name each "
                "state once"
            )
    if max(states, default=0) < INPUTS:
        raise ValueError(
            f"concat is {states}, but the output needs a state that a pair computes: add one of "
            f"{INPUTS} to {last}"
        )
    return states


def _canonical(cell: Cell) -> Cell:
    """Renumber the pairs so that the sequence of (pair, in concat) is the smallest possible.

    The smallest entry wins at each step, as later entries cannot make up for it. All orders that
    tie are followed. Of states that are read by the same elements of the same pairs, only one is
    followed: to swap them changes nothing.
    """
    pair_of = {state: cell.pairs[state - INPUTS] for state in _live(cell)}
    reads = [(source, op, state) for state, pair in pair_of.items() for op, source in pair]
    readers = {state: tuple(read[1:] for read in reads if read[0] == state) for state in pair_of}
    orders = [{0: 0, 1: 1}]  # old number -> new number, of the states numbered so far
    pairs: list[Pair] = []
    for number in range(INPUTS, INPUTS + len(pair_of)):
        steps = []
        for order in orders:
            ready = {
                (_renamed(pair, order), state in cell.concat, readers[state]): state
                for state, pair in pair_of.items()
                if state not in order and all(source in order for _, source in pair)
            }
            steps += [(entry[:2], {**order, state: number}) for entry, state in ready.items()]
        least = min(entry for entry, _ in steps)
        orders = [order for entry, order in steps if entry == least]
        pairs.append(least[0])
    return Cell(tuple(pairs), tuple(sorted(orders[0][state] for state in cell.concat)))


def _live(cell: Cell) -> list[int]:
    """Return the states of the pairs that reach the output."""
    reached = set(cell.concat)
    for state in reversed(range(INPUTS, cell.states)):
        if state in reached:
            reached.update(source for _, source in cell.pairs[state - INPUTS])
    return sorted(reached - set(range(INPUTS)))


def _renamed(pair: Pair, names: dict[int, int]) -> Pair:
    a, b = sorted((operation, names[state]) for operation, state in pair)
    return a, b


def _check_keys(
    place: str, value: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raise ValueError unless a JSON value is an object with these keys."""
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: expected an object with {', '.join(required)}, got {_short(value)}: give "
            "what to_json returned"
        )
    for key in required:
        if key not in value:
            raise ValueError(f"{place}: {key!r} is missing from {_short(list(value))}: add it")
    for key in value:
        if key not in required + optional:
            known = ", ".join(required + optional)
            raise ValueError(f"{place}: unknown key {_short(key)}; known: {known}")


def _read_cell(kind: str, value: Any) -> Cell:
    _check_keys(f"{kind} cell", value, ("pairs", "concat"))
    try:
        return Cell(value["pairs"], value["concat"])
    except ValueError as error:
        raise ValueError(f"{kind} cell: {error}") from error
