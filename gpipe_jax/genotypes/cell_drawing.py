"""Drawings of cells: as text, as SVG for notebooks, and as a matplotlib figure.

States stand in layers, each below all that it reads. A wire that crosses layers runs in a lane
between their boxes; all that read the same state share its lanes.
"""

from itertools import accumulate, pairwise, zip_longest
from typing import TYPE_CHECKING, Any

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.graph_drawing import (
    BOX_HEIGHT,
    CHARACTER,
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

    from gpipe_jax.genotypes.genotype import Cell, Genotype

INPUTS = 2  # states that a cell is given: h0 and h1
LEGEND = (
    "h0: the cell's direct input, the output of the cell before it",
    "h1: the cell's skip input, the output of the cell before that",
)
TITLES = {"normal": "normal cell", "reduction": "reduction cell (stride 2 from h0 and h1)"}


def text(genotype: "Genotype") -> str:
    """Both cells, pair by pair: where each operation reads, and who reads the sum."""
    lines = [*([genotype.name] if genotype.name else []), *LEGEND]
    for kind, title in TITLES.items():
        lines += ["", title, cell_text(getattr(genotype, kind))]
    return "\n".join(lines)


def cell_text(cell: "Cell") -> str:
    """One cell: two lines for each pair, then the output."""
    width = max(len(operation) for pair in cell.pairs for operation, _ in pair) + 1
    source = len(f"h{cell.states - 1}")
    lines = []
    for made, pair in enumerate(cell.pairs, INPUTS):
        a, b = (f"  {f'h{s}':>{source}} ── {f'{op} ':─<{width}}─" for op, s in pair)
        readers = ", ".join(_readers(cell, made)) or "nothing"
        lines += [f"{a}┐", f"{b}┴─ + ── {f'h{made}':<{source}} ──▶ {readers}"]
    return "\n".join([*lines, f"  {_output(cell)}"])


def _readers(cell: "Cell", state: int) -> list[str]:
    sources = [{source for _, source in pair} for pair in cell.pairs]
    names = [f"h{made}" for made, read in enumerate(sources, INPUTS) if state in read]
    return names + ["output"] * (state in cell.concat)


def _output(cell: "Cell") -> str:
    return f"output = concat({', '.join(f'h{state}' for state in cell.concat)})"


OPERATION_WIDTH, BETWEEN = 96.0, 8.0
PAIR_WIDTH, PAIR_HEIGHT = 2 * OPERATION_WIDTH + BETWEEN, 2 * BOX_HEIGHT + 18.0
LANE_WIDTH, SIDE_GAP, LAYER_GAP = 4.0, 18.0, 46.0
WIRES = ("#1f77b4", "#d9660a", "#2c8f2c", "#c0282a", "#8155b0", "#7a4a3e", "#c2459b", "#0e8f9c")
FILLS = {"pool": "#e3f1dc", "conv": "#dbe9f9", "sep": "#dbe9f9", "identity": "#eeeeee"}


class _Layout:
    """Where the states of a cell stand. `columns[k][state]` is the x of its box or lane."""

    def __init__(self, cell: "Cell") -> None:
        self.cell = cell
        self.layer = [0] * INPUTS  # of each state
        for (_, a), (_, b) in cell.pairs:
            self.layer.append(1 + max(self.layer[a], self.layer[b]))
        self.depth = 1 + max(self.layer)  # the layer of the output
        self.last = list(self.layer)  # the last layer that reads each state
        for made, pair in enumerate(cell.pairs, INPUTS):
            for _, source in pair:
                self.last[source] = max(self.last[source], self.layer[made])
        for state in cell.concat:
            self.last[state] = self.depth
        self.columns = [{0: 0.0, 1: PAIR_WIDTH + SIDE_GAP}]
        for k in range(1, self.depth):
            self.columns.append(self._column(k))

    def _column(self, k: int) -> dict[int, float]:
        """Boxes and lanes of a layer, each as near to what it comes from as the others allow."""
        above, wanted = self.columns[-1], {}
        for state, (first, last) in enumerate(zip(self.layer, self.last, strict=True)):
            if first == k:
                (_, a), (_, b) = self.cell.pairs[state - INPUTS]
                wanted[state] = (above[a] + above[b]) / 2
            elif first < k < last:
                wanted[state] = above[state]
        order = sorted(wanted, key=lambda state: wanted[state])
        widths = [PAIR_WIDTH if self.layer[state] == k else LANE_WIDTH for state in order]
        return dict(zip(order, _spread([wanted[s] for s in order], widths), strict=True))

    def top(self, k: int) -> float:
        below_inputs = MARGIN + TITLE_HEIGHT + BOX_HEIGHT + LAYER_GAP
        return below_inputs + (k - 1) * (PAIR_HEIGHT + LAYER_GAP) if k else MARGIN + TITLE_HEIGHT

    def bottom(self, k: int) -> float:
        return self.top(k) + (PAIR_HEIGHT if k else BOX_HEIGHT)

    def wire(self, state: int, end: tuple[float, float], k: int) -> Edge:
        """From a state through its lanes to a point on top of layer k."""
        points = []
        for j in range(self.layer[state], k):
            x = self.columns[j][state]
            points += [(x, self.top(j)), (x, self.bottom(j))]
        return Edge([*points[1:], end], WIRES[state % len(WIRES)])


def _spread(wanted: list[float], widths: list[float]) -> list[float]:
    """Positions near the wanted, increasing ones, with a gap between boxes of these widths.

    Pushing apart to the right and pushing apart to the left both leave the gaps; so does the mean.
    """
    distances = [SIDE_GAP + (a + b) / 2 for a, b in pairwise(widths)]
    steps = list(accumulate(distances, initial=0.0))
    slack = [x - step for x, step in zip(wanted, steps, strict=True)]
    right = list(accumulate(slack, max))
    left = list(accumulate(reversed(slack), min))[::-1]
    return [(a + b) / 2 + step for a, b, step in zip(right, left, steps, strict=True)]


def picture(cell: "Cell", title: str, before: "Cell | None" = None) -> Picture:
    """The layout of one cell; marked is where it differs from the cell `before`."""
    layout = _Layout(cell)
    boxes = [
        Box(layout.columns[0][0], layout.top(0), OPERATION_WIDTH, "h0: direct", edge=WIRES[0]),
        Box(layout.columns[0][1], layout.top(0), OPERATION_WIDTH, "h1: skip", edge=WIRES[1]),
    ]
    wires: list[Edge] = []
    for made in range(INPUTS, cell.states):
        _draw_pair(layout, made, before or cell, boxes, wires)
    _draw_output(layout, before or cell, boxes, wires)
    return graph_drawing.fitted(title, boxes, wires, layout.top(layout.depth) + BOX_HEIGHT + MARGIN)


def _draw_pair(
    layout: _Layout, made: int, before: "Cell", boxes: list[Box], wires: list[Edge]
) -> None:
    k, i = layout.layer[made], made - INPUTS
    x, top = layout.columns[k][made], layout.top(k)
    old = before.pairs[i] if i < len(before.pairs) else (None, None)
    elements = sorted(
        ((new, new != was) for new, was in zip(layout.cell.pairs[i], old, strict=True)),
        key=lambda element: layout.columns[k - 1][element[0][1]],
    )
    sum_top = top + PAIR_HEIGHT - BOX_HEIGHT
    for ((operation, source), changed), side in zip(elements, (-1, 1), strict=True):
        centre = x + side * (OPERATION_WIDTH + BETWEEN) / 2
        fill = next(colour for part, colour in FILLS.items() if part in operation)
        box = Box(centre, top, OPERATION_WIDTH, operation, fill)
        wire = layout.wire(source, (centre, top), k)
        boxes.append(box.marked() if changed else box)
        wires.append(wire.marked() if changed else wire)
        wires.append(Edge([(centre, top + BOX_HEIGHT), (x + side * 14, sum_top)], GREY))
    edge = WIRES[made % len(WIRES)]
    boxes.append(Box(x, sum_top, OPERATION_WIDTH, f"h{made} = sum", edge=edge))


def _draw_output(layout: _Layout, before: "Cell", boxes: list[Box], wires: list[Edge]) -> None:
    k, cell = layout.depth, layout.cell
    above = layout.columns[k - 1]
    order = sorted(cell.concat, key=lambda state: above[state])
    label, step = _output(cell), 24.0
    x = sum(above[state] for state in order) / len(order)
    box = Box(x, layout.top(k), max(len(label) * CHARACTER, len(order) * step), label)
    boxes.append(box.marked() if set(cell.concat) != set(before.concat) else box)
    for i, state in enumerate(order):
        end = x + step * (i - (len(order) - 1) / 2)
        wire = layout.wire(state, (end, layout.top(k)), k)
        wires.append(wire if state in before.concat else wire.marked())


def html(genotype: "Genotype", before: "Genotype | None" = None) -> str:
    """Both cells as inline SVG; marked is where they differ from those `before`."""
    return graph_drawing.side_by_side(pictures(genotype, before))


def pictures(genotype: "Genotype", before: "Genotype | None" = None) -> list[Picture]:
    """The layout of both cells; marked is where they differ from those `before`."""
    name = f"{genotype.name}, " if genotype.name else ""
    old = before or genotype
    return [
        picture(getattr(genotype, kind), name + title, getattr(old, kind))
        for kind, title in TITLES.items()
    ]


def differences(genotype: "Genotype", before: "Genotype") -> list[str]:
    """What is other than before, in words: `normal h4: sep_3x3(h1) → sep_3x3(h0)`."""
    return [
        f"{kind} {line}"
        for kind in TITLES
        for line in _differences(getattr(genotype, kind), getattr(before, kind))
    ]


def _differences(cell: "Cell", before: "Cell") -> list[str]:
    def element(pair: Any, k: int) -> str:
        return f"{pair[k][0]}(h{pair[k][1]})" if pair else "nothing"

    lines = [
        f"h{made}: {element(old, k)} → {element(new, k)}"
        for made, (old, new) in enumerate(zip_longest(before.pairs, cell.pairs), INPUTS)
        for k in range(2)
        if element(old, k) != element(new, k)
    ]
    return lines + [f"{_output(before)} → {_output(cell)}"] * (
        sorted(cell.concat) != sorted(before.concat)
    )


def figure(genotype: "Genotype", path: "str | Path | None" = None) -> "Figure":
    """Both cells side by side, in a matplotlib figure; written to `path` where given."""
    return graph_drawing.figure(pictures(genotype), path)
