"""Lay out a cell of NAS-Bench-201: four nodes below each other, edges as boxes between them.

                0: input               row 0
                  0-1                  row 1
        0-2      1: sum                row 2
                  1-2            0-3   row 3
                 2: sum    1-3         row 4
                  2-3                  row 5
                3: output              row 6
        -1         0        1     2    column

Every edge has a fixed place, so that two cells can be compared at a glance.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gpipe_jax.genotypes.cell_drawing import EDGE_COLOURS, FILL_COLOURS
from gpipe_jax.utils.graph_drawing import (
    BOX_HEIGHT,
    GREY,
    MARGIN,
    TITLE_HEIGHT,
    Box,
    Edge,
    Picture,
    fit_width,
)

NODE_WIDTH, WIDTH, STEP, COLUMN = 128.0, 104.0, 50.0, 134.0
NODES = ("0: input", "1: sum", "2: sum", "3: output")
PALE = "#d4d4d4"  # of edges that are `none`


class CellEdge(NamedTuple):
    """Hold an edge of a cell: its nodes and its operation."""

    source: int
    target: int
    operation: str


class _Place(NamedTuple):
    """Hold where an edge's box is, and where its wire leaves and enters the nodes."""

    column: int
    row: int
    leaves: float  # from the middle of the source, so that the wire passes beside all boxes
    enters: float  # from the middle of the target


PLACES = {  # by (source, target)
    (0, 1): _Place(0, 1, 0, 0),
    (0, 2): _Place(-1, 2, -44, -44),
    (1, 2): _Place(0, 3, 0, 0),
    (0, 3): _Place(2, 3, 44, 58),
    (1, 3): _Place(1, 4, 44, 44),
    (2, 3): _Place(0, 5, 0, 0),
}


def picture(
    edges: Sequence[CellEdge], title: str, before: Sequence[CellEdge] | None = None
) -> Picture:
    """Lay out one cell; edges that differ from those `before` are marked."""
    boxes = [Box(0.0, _top(2 * node), NODE_WIDTH, text) for node, text in enumerate(NODES)]
    for node in range(3):  # all but the output have edges of their colour
        boxes[node] = boxes[node]._replace(border=EDGE_COLOURS[node])
    wires: list[Edge] = []
    for k, (source, target, name) in enumerate(edges):
        place = PLACES[source, target]
        is_none = name == "none"
        colour = PALE if is_none else EDGE_COLOURS[source]
        x, top = place.column * COLUMN, _top(place.row)
        box = Box(x, top, WIDTH, name, _fill(name), PALE if is_none else GREY)
        above = Edge([(place.leaves, _top(2 * source) + BOX_HEIGHT), (x, top)], colour)
        below = Edge([(x, top + BOX_HEIGHT), (place.enters, _top(2 * target))], colour)
        if before is not None and before[k] != edges[k]:
            box, above, below = box.marked(), above.marked(), below.marked()
        boxes.append(box)
        wires += [above, below]
    return fit_width(title, boxes, wires, _top(6) + BOX_HEIGHT + MARGIN)


def differences(edges: Sequence[CellEdge], before: Sequence[CellEdge]) -> list[str]:
    """Describe each edge whose operation differs from the one `before`."""
    return [
        f"edge {new.source} to {new.target}: {old.operation} → {new.operation}"
        for old, new in zip(before, edges, strict=True)
        if old != new
    ]


def _top(row: int) -> float:
    return MARGIN + TITLE_HEIGHT + row * STEP


def _fill(name: str) -> str:
    for part, colour in FILL_COLOURS.items():
        if part in name:
            return colour
    return FILL_COLOURS["identity"] if name == "skip_connect" else "#ffffff"
