"""The layout of a cell of NAS-Bench-201: its four nodes below each other, edges as boxes between.

Every edge has its place, so that two cells can be compared at a glance.
"""

from gpipe_jax.genotypes.cell_drawing import FILLS, WIRES
from gpipe_jax.utils.graph_drawing import (
    BOX_HEIGHT,
    GREY,
    MARGIN,
    TITLE_HEIGHT,
    Box,
    Edge,
    Picture,
    fitted,
)
from nas.spaces.nasbench201 import EDGES, OPERATIONS, Edges

NODE_WIDTH, WIDTH, STEP, COLUMN = 128.0, 104.0, 50.0, 134.0
NODES = ("0: input", "1: sum", "2: sum", "3: output")
# Of each edge its column, its row, and where it leaves and enters its nodes: beside all boxes.
PLACES = (
    (0, 1, 0, 0),
    (-1, 2, -44, -44),
    (0, 3, 0, 0),
    (2, 3, 44, 58),
    (1, 4, 44, 44),
    (0, 5, 0, 0),
)
PALE = "#d4d4d4"  # of edges that are `none`


def picture(edges: Edges, title: str, before: Edges | None = None) -> Picture:
    """The layout of one cell; marked are edges that differ from those `before`."""
    boxes = [Box(0.0, _top(2 * node), NODE_WIDTH, text) for node, text in enumerate(NODES)]
    boxes = [box._replace(edge=WIRES[node]) for node, box in enumerate(boxes[:3])] + boxes[3:]
    wires: list[Edge] = []
    for edge, (source, target) in enumerate(EDGES):
        (column, row, leaves, enters), name = PLACES[edge], OPERATIONS[edges[edge]]
        colour = PALE if name == "none" else WIRES[source]
        x, top = column * COLUMN, _top(row)
        box = Box(x, top, WIDTH, name, _fill(name), PALE if name == "none" else GREY)
        both = [
            Edge([(leaves, _top(2 * source) + BOX_HEIGHT), (x, top)], colour),
            Edge([(x, top + BOX_HEIGHT), (enters, _top(2 * target))], colour),
        ]
        changed = before is not None and before[edge] != edges[edge]
        boxes.append(box.marked() if changed else box)
        wires += [wire.marked() if changed else wire for wire in both]
    return fitted(title, boxes, wires, _top(6) + BOX_HEIGHT + MARGIN)


def differences(edges: Edges, before: Edges) -> list[str]:
    """What is other than before, in words."""
    return [
        f"edge {source} to {target}: {OPERATIONS[old]} → {OPERATIONS[new]}"
        for (source, target), old, new in zip(EDGES, before, edges, strict=True)
        if old != new
    ]


def _top(row: int) -> float:
    return MARGIN + TITLE_HEIGHT + row * STEP


def _fill(name: str) -> str:
    return next(
        (colour for part, colour in FILLS.items() if part in name),
        FILLS["identity"] if name == "skip_connect" else "#ffffff",
    )
