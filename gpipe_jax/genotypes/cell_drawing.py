"""Draw cells: as text, as SVG for notebooks, and as a matplotlib figure.

States stand in layers, each below everything that it reads. An edge that crosses a layer runs in a
lane between its boxes; all readers of a state share its lanes:

    layer 0    [h0: direct]        [h1: skip]
                  |     \\         /    |
    layer 1       |    [op] [op]       |        h0 and h1 are read further below:
                  |      \\  /          |        each has a lane in layer 1
                  |   [h2 = sum]       |
                  |       |           /
    layer 2        \\     [op]      [op]
                    \\       \\     /
                     \\   [h3 = sum]
                      \\      |
    output           [output = concat(...)]
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.graph_drawing import (
    BOX_HEIGHT,
    CHARACTER_WIDTH,
    GREY,
    MARGIN,
    TITLE_HEIGHT,
    Box,
    Edge,
    Picture,
)

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

Element = tuple[str, int]  # an operation, and the state that it reads
Pair = tuple[Element, Element]

INPUTS = 2  # the states 0 and 1, the inputs of a cell, which no pair computes
LEGEND = (
    "h0: the cell's direct input, the output of the cell before it",
    "h1: the cell's skip input, the output of the cell before that",
)
TITLES = {"normal": "normal cell", "reduction": "reduction cell (stride 2 from h0 and h1)"}


class Graph(NamedTuple):
    """Hold a cell as it is drawn: pair i computes state 2 + i."""

    pairs: Sequence[Pair]
    concat: Sequence[int]  # the states that form the output

    @property
    def states(self) -> int:
        """Return the number of hidden states, both inputs included."""
        return INPUTS + len(self.pairs)


Cells = Mapping[str, Graph]  # by their kind, "normal" and "reduction"


def text(cells: Cells, name: str = "") -> str:
    """Write both cells, pair by pair: where each operation reads, and who reads the sum."""
    lines = [name, *LEGEND] if name else [*LEGEND]
    for kind, title in TITLES.items():
        lines += ["", title, cell_text(cells[kind])]
    return "\n".join(lines)


def cell_text(cell: Graph) -> str:
    """Write one cell: two lines for each pair, then the output."""
    width = max(len(operation) for pair in cell.pairs for operation, _ in pair) + 1
    source_width = len(f"h{cell.states - 1}")
    lines = []
    for state, pair in enumerate(cell.pairs, INPUTS):
        a, b = (f"  {f'h{s}':>{source_width}} ── {f'{op} ':─<{width}}─" for op, s in pair)
        readers = ", ".join(_readers(cell, state)) or "nothing"
        lines += [f"{a}┐", f"{b}┴─ + ── {f'h{state}':<{source_width}} ──▶ {readers}"]
    return "\n".join([*lines, f"  {_output(cell)}"])


def _readers(cell: Graph, state: int) -> list[str]:
    """Name the states that read a state, and the output if it does."""
    sources = [{source for _, source in pair} for pair in cell.pairs]
    names = [f"h{reader}" for reader, read in enumerate(sources, INPUTS) if state in read]
    return [*names, "output"] if state in cell.concat else names


def _output(cell: Graph) -> str:
    return f"output = concat({', '.join(f'h{state}' for state in cell.concat)})"


# Sizes in pixels.
OPERATION_WIDTH, OPERATION_GAP = 96.0, 8.0
PAIR_WIDTH, PAIR_HEIGHT = 2 * OPERATION_WIDTH + OPERATION_GAP, 2 * BOX_HEIGHT + 18.0
LANE_WIDTH, SIDE_GAP, LAYER_GAP = 4.0, 18.0, 46.0
OUTPUT_STEP = 24.0  # between the arrow heads of the output
EDGE_COLOURS = (
    "#1f77b4",
    "#d9660a",
    "#2c8f2c",
    "#c0282a",
    "#8155b0",
    "#7a4a3e",
    "#c2459b",
    "#0e8f9c",
)
FILL_COLOURS = {  # by a part of the operation's name
    "pool": "#e3f1dc",
    "conv": "#dbe9f9",
    "sep": "#dbe9f9",
    "identity": "#eeeeee",
}


class _CellLayout:
    """Place the states of a cell. `columns[k][state]` is the x of its box or lane in layer k."""

    def __init__(self, cell: Graph) -> None:
        self.cell = cell
        self.layer = [0] * INPUTS  # of each state
        for (_, a), (_, b) in cell.pairs:
            self.layer.append(1 + max(self.layer[a], self.layer[b]))
        self.depth = 1 + max(self.layer)  # the layer of the output
        self.last = list(self.layer)  # the last layer that reads each state
        for state, pair in enumerate(cell.pairs, INPUTS):
            for _, source in pair:
                self.last[source] = max(self.last[source], self.layer[state])
        for state in cell.concat:
            self.last[state] = self.depth
        self.columns = [{0: 0.0, 1: PAIR_WIDTH + SIDE_GAP}]
        for k in range(1, self.depth):
            self.columns.append(self._column(k))

    def _column(self, k: int) -> dict[int, float]:
        """Place the boxes and lanes of layer k, each near its sources in the layer above."""
        above, preferred = self.columns[-1], {}
        for state, (first, last) in enumerate(zip(self.layer, self.last, strict=True)):
            if first == k:
                (_, a), (_, b) = self.cell.pairs[state - INPUTS]
                preferred[state] = (above[a] + above[b]) / 2
            elif first < k < last:
                preferred[state] = above[state]
        order = sorted(preferred, key=lambda state: preferred[state])
        widths = [PAIR_WIDTH if self.layer[state] == k else LANE_WIDTH for state in order]
        return dict(zip(order, _spread([preferred[s] for s in order], widths), strict=True))

    def top(self, k: int) -> float:
        """Return the y of the top of layer k."""
        if k == 0:
            return MARGIN + TITLE_HEIGHT
        below_inputs = MARGIN + TITLE_HEIGHT + BOX_HEIGHT + LAYER_GAP
        return below_inputs + (k - 1) * (PAIR_HEIGHT + LAYER_GAP)

    def bottom(self, k: int) -> float:
        """Return the y of the bottom of layer k."""
        return self.top(k) + (PAIR_HEIGHT if k else BOX_HEIGHT)

    def edge(self, state: int, end: tuple[float, float], k: int) -> Edge:
        """Return the edge from a state through its lanes to a point at the top of layer k."""
        points = []
        for j in range(self.layer[state], k):
            x = self.columns[j][state]
            points += [(x, self.top(j)), (x, self.bottom(j))]
        return Edge([*points[1:], end], EDGE_COLOURS[state % len(EDGE_COLOURS)])


def _spread(preferred: list[float], widths: list[float]) -> list[float]:
    """Return positions near the preferred ones (in rising order), with gaps between the boxes.

    Pushing boxes apart to the right leaves the gaps, and so does pushing them to the left. The mean
    of the two leaves them too.
    """
    distances = [SIDE_GAP + (a + b) / 2 for a, b in pairwise(widths)]
    steps = list(accumulate(distances, initial=0.0))
    slack = [x - step for x, step in zip(preferred, steps, strict=True)]
    right = list(accumulate(slack, max))
    left = list(accumulate(reversed(slack), min))[::-1]
    return [(a + b) / 2 + step for a, b, step in zip(right, left, steps, strict=True)]


def picture(cell: Graph, title: str, before: Graph | None = None) -> Picture:
    """Lay out one cell; mark where it differs from the cell `before`."""
    layout = _CellLayout(cell)
    x, y = layout.columns[0], layout.top(0)
    boxes = [
        Box(x[0], y, OPERATION_WIDTH, "h0: direct", border=EDGE_COLOURS[0]),
        Box(x[1], y, OPERATION_WIDTH, "h1: skip", border=EDGE_COLOURS[1]),
    ]
    edges: list[Edge] = []
    for state in range(INPUTS, cell.states):
        _draw_pair(layout, state, before or cell, boxes, edges)
    _draw_output(layout, before or cell, boxes, edges)
    height = layout.top(layout.depth) + BOX_HEIGHT + MARGIN
    return graph_drawing.fit_width(title, boxes, edges, height)


def _draw_pair(
    layout: _CellLayout, state: int, before: Graph, boxes: list[Box], edges: list[Edge]
) -> None:
    """Add the two operations that a state sums, and the sum."""
    k, i = layout.layer[state], state - INPUTS
    x, top = layout.columns[k][state], layout.top(k)
    old_pair = before.pairs[i] if i < len(before.pairs) else (None, None)
    elements = sorted(
        ((new, new != old) for new, old in zip(layout.cell.pairs[i], old_pair, strict=True)),
        key=lambda element: layout.columns[k - 1][element[0][1]],
    )
    sum_top = top + PAIR_HEIGHT - BOX_HEIGHT
    for ((operation, source), changed), side in zip(elements, (-1, 1), strict=True):
        centre = x + side * (OPERATION_WIDTH + OPERATION_GAP) / 2
        fill = next(colour for name, colour in FILL_COLOURS.items() if name in operation)
        box = Box(centre, top, OPERATION_WIDTH, operation, fill)
        edge = layout.edge(source, (centre, top), k)
        boxes.append(box.marked() if changed else box)
        edges.append(edge.marked() if changed else edge)
        edges.append(Edge([(centre, top + BOX_HEIGHT), (x + side * 14, sum_top)], GREY))
    border = EDGE_COLOURS[state % len(EDGE_COLOURS)]
    boxes.append(Box(x, sum_top, OPERATION_WIDTH, f"h{state} = sum", border=border))


def _draw_output(layout: _CellLayout, before: Graph, boxes: list[Box], edges: list[Edge]) -> None:
    """Add the output and the edges to it."""
    k, cell = layout.depth, layout.cell
    above = layout.columns[k - 1]
    order = sorted(cell.concat, key=lambda state: above[state])
    label = _output(cell)
    x = sum(above[state] for state in order) / len(order)
    width = max(len(label) * CHARACTER_WIDTH, len(order) * OUTPUT_STEP)
    box = Box(x, layout.top(k), width, label)
    boxes.append(box.marked() if set(cell.concat) != set(before.concat) else box)
    for i, state in enumerate(order):
        end = x + OUTPUT_STEP * (i - (len(order) - 1) / 2)
        edge = layout.edge(state, (end, layout.top(k)), k)
        edges.append(edge if state in before.concat else edge.marked())


def pictures(cells: Cells, name: str = "", before: Cells | None = None) -> list[Picture]:
    """Lay out both cells; mark where they differ from those `before`."""
    prefix = f"{name}, " if name else ""
    old = before or cells
    return [picture(cells[kind], prefix + title, old[kind]) for kind, title in TITLES.items()]


def html(cells: Cells, name: str = "") -> str:
    """Draw both cells as inline SVG."""
    return graph_drawing.side_by_side(pictures(cells, name))


def figure(cells: Cells, name: str = "", path: "str | Path | None" = None) -> "Figure":
    """Draw both cells side by side in a matplotlib figure; write it to `path` if given."""
    return graph_drawing.figure(pictures(cells, name), path)


def differences(cells: Cells, before: Cells) -> list[str]:
    """List what differs, a line each: `normal h4: sep_3x3(h1) → sep_3x3(h0)`."""
    return [f"{kind} {line}" for kind in TITLES for line in _changes(cells[kind], before[kind])]


def _changes(cell: Graph, before: Graph) -> list[str]:
    def element(pair: Pair | None, k: int) -> str:
        return f"{pair[k][0]}(h{pair[k][1]})" if pair else "nothing"

    lines = [
        f"h{state}: {element(old, k)} → {element(new, k)}"
        for state, (old, new) in enumerate(zip_longest(before.pairs, cell.pairs), INPUTS)
        for k in range(2)
        if element(old, k) != element(new, k)
    ]
    if sorted(cell.concat) != sorted(before.concat):
        lines.append(f"{_output(before)} → {_output(cell)}")
    return lines
