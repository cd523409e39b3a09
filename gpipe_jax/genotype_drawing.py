"""Drawings of cells: as text, as SVG for notebooks, and as a matplotlib figure.

The two pictures share one layout. States stand in layers, each below all that it reads. A wire that
crosses layers runs in a lane between their boxes; all that read the same state share its lanes.
Coordinates are pixels, x to the right and y down.
"""

import html as escaping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpipe_jax.genotype import Cell, Genotype

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


OPERATION_WIDTH, BOX_HEIGHT, BETWEEN = 96.0, 24.0, 8.0
PAIR_WIDTH, PAIR_HEIGHT = 2 * OPERATION_WIDTH + BETWEEN, 2 * BOX_HEIGHT + 18.0
LANE_WIDTH, SIDE_GAP, LAYER_GAP, MARGIN, TITLE_HEIGHT = 4.0, 18.0, 46.0, 16.0, 30.0
CHARACTER = 7.0  # the width of one
FONT_SIZE, TITLE_SIZE, PIXELS_PER_INCH = 11, 14, 100
WIRES = ("#1f77b4", "#d9660a", "#2c8f2c", "#c0282a", "#8155b0", "#7a4a3e", "#c2459b", "#0e8f9c")
GREY = "#666666"
FILLS = {"pool": "#e3f1dc", "conv": "#dbe9f9", "sep": "#dbe9f9", "identity": "#eeeeee"}


class Box(NamedTuple):
    """A box with one line of text; x is its centre and y its top."""

    x: float
    y: float
    width: float
    text: str
    fill: str = "#ffffff"
    edge: str = GREY


class Wire(NamedTuple):
    """A smooth line through points, vertical at each, that ends in an arrow head."""

    points: list[tuple[float, float]]
    colour: str


class Picture(NamedTuple):
    """All that is drawn of a cell."""

    title: str
    width: float
    height: float
    boxes: list[Box]
    wires: list[Wire]


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

    def wire(self, state: int, end: tuple[float, float], k: int) -> Wire:
        """From a state through its lanes to a point on top of layer k."""
        points = []
        for j in range(self.layer[state], k):
            x = self.columns[j][state]
            points += [(x, self.top(j)), (x, self.bottom(j))]
        return Wire([*points[1:], end], WIRES[state % len(WIRES)])


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


def picture(cell: "Cell", title: str) -> Picture:
    """The layout of one cell."""
    layout = _Layout(cell)
    boxes = [
        Box(layout.columns[0][0], layout.top(0), OPERATION_WIDTH, "h0: direct", edge=WIRES[0]),
        Box(layout.columns[0][1], layout.top(0), OPERATION_WIDTH, "h1: skip", edge=WIRES[1]),
    ]
    wires = []
    for made in range(INPUTS, cell.states):
        _draw_pair(layout, made, boxes, wires)
    _draw_output(layout, boxes, wires)
    ends = [box.x + side * box.width / 2 for box in boxes for side in (-1, 1)]
    ends += [x for wire in wires for x, _ in wire.points]
    title_width = len(title) * CHARACTER * TITLE_SIZE / FONT_SIZE
    width = max(max(ends) - min(ends), title_width) + 2 * MARGIN
    left = (min(ends) + max(ends) - width) / 2
    boxes = [box._replace(x=box.x - left) for box in boxes]
    wires = [wire._replace(points=[(x - left, y) for x, y in wire.points]) for wire in wires]
    return Picture(title, width, layout.top(layout.depth) + BOX_HEIGHT + MARGIN, boxes, wires)


def _draw_pair(layout: _Layout, made: int, boxes: list[Box], wires: list[Wire]) -> None:
    k = layout.layer[made]
    x, top = layout.columns[k][made], layout.top(k)
    elements = sorted(
        layout.cell.pairs[made - INPUTS], key=lambda element: layout.columns[k - 1][element[1]]
    )
    sum_top = top + PAIR_HEIGHT - BOX_HEIGHT
    for (operation, source), side in zip(elements, (-1, 1), strict=True):
        centre = x + side * (OPERATION_WIDTH + BETWEEN) / 2
        fill = next(colour for part, colour in FILLS.items() if part in operation)
        boxes.append(Box(centre, top, OPERATION_WIDTH, operation, fill))
        wires.append(layout.wire(source, (centre, top), k))
        wires.append(Wire([(centre, top + BOX_HEIGHT), (x + side * 14, sum_top)], GREY))
    edge = WIRES[made % len(WIRES)]
    boxes.append(Box(x, sum_top, OPERATION_WIDTH, f"h{made} = sum", edge=edge))


def _draw_output(layout: _Layout, boxes: list[Box], wires: list[Wire]) -> None:
    k, cell = layout.depth, layout.cell
    above = layout.columns[k - 1]
    order = sorted(cell.concat, key=lambda state: above[state])
    label, step = _output(cell), 24.0
    x = sum(above[state] for state in order) / len(order)
    boxes.append(Box(x, layout.top(k), max(len(label) * CHARACTER, len(order) * step), label))
    for i, state in enumerate(order):
        end = x + step * (i - (len(order) - 1) / 2)
        wires.append(layout.wire(state, (end, layout.top(k)), k))


def html(genotype: "Genotype") -> str:
    """Both cells as inline SVG, side by side where the page is wide enough."""
    cells = "".join(map(_svg, _pictures(genotype)))
    return f'<div style="display:flex;flex-wrap:wrap">{cells}</div>'


def _pictures(genotype: "Genotype") -> list[Picture]:
    name = f"{genotype.name}, " if genotype.name else ""
    return [picture(getattr(genotype, kind), name + title) for kind, title in TITLES.items()]


def _svg(drawn: Picture) -> str:
    title, width, height = escaping.escape(drawn.title), drawn.width, drawn.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.1f} {height:.1f}" '
        'style="max-width:100%;height:auto;background:#ffffff" '
        f'font-family="sans-serif" font-size="{FONT_SIZE}" text-anchor="middle">'
        f"<title>{title}</title>"
        f'<text x="{width / 2:.1f}" y="{MARGIN + 8}" font-size="{TITLE_SIZE}">{title}</text>'
        f"{''.join(map(_svg_wire, drawn.wires))}{''.join(map(_svg_box, drawn.boxes))}</svg>"
    )


def _svg_wire(wire: Wire) -> str:
    (x, y), end = wire.points[0], wire.points[-1]
    path = f"M{x:.1f} {y:.1f}" + "".join(
        f"C{x0:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {y1:.1f}"
        for (x0, y0), (x1, y1) in pairwise(wire.points)
    )
    head = f"M{end[0]:.1f} {end[1]:.1f}l-3.5 -7h7z"
    return (
        f'<path d="{path}" fill="none" stroke="{wire.colour}" stroke-width="1.6"/>'
        f'<path d="{head}" fill="{wire.colour}"/>'
    )


def _svg_box(box: Box) -> str:
    return (
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{BOX_HEIGHT}" rx="4" fill="{box.fill}" stroke="{box.edge}" stroke-width="1.4"/>'
        f'<text x="{box.x:.1f}" y="{box.y + 16:.1f}" fill="#111111">{box.text}</text>'
    )


def figure(genotype: "Genotype", path: str | Path | None = None) -> "Figure":
    """Both cells side by side, in a matplotlib figure; written to `path` where given."""
    from gpipe_jax.figure import blank

    drawn = _pictures(genotype)
    width, height = sum(d.width for d in drawn), max(d.height for d in drawn)
    drawing = blank(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    drawing.set_layout_engine("none")  # the layout is made already
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _draw(axes, drawn[0], 0.0)
    _draw(axes, drawn[1], drawn[0].width)
    if path is not None:
        # Without a format matplotlib would add a suffix to a name that has none.
        drawing.savefig(path, dpi=120, format=Path(path).suffix[1:] or "png")
    return drawing


def _draw(axes: "Axes", drawn: Picture, left: float) -> None:
    from matplotlib import patches

    def write(x: float, y: float, text: str, size: float) -> None:
        points = size * 72 / PIXELS_PER_INCH
        axes.text(x, y, text, ha="center", va="center", fontsize=points, parse_math=False)

    write(left + drawn.width / 2, MARGIN + 4, drawn.title, TITLE_SIZE)
    for wire in drawn.wires:
        points = [(left + x, y) for x, y in wire.points]
        (x, y), colour = points[-1], wire.colour
        axes.add_patch(patches.PathPatch(_curve(points), fill=False, edgecolor=colour, lw=1.2))
        head = [(x, y), (x - 3.5, y - 7), (x + 3.5, y - 7)]
        axes.add_patch(patches.Polygon(head, facecolor=colour, edgecolor="none"))
    rounded = "round,pad=0,rounding_size=4"
    for box in drawn.boxes:
        corner = (left + box.x - box.width / 2, box.y)
        shape = patches.FancyBboxPatch(corner, box.width, BOX_HEIGHT, boxstyle=rounded)
        shape.set(edgecolor=box.edge, facecolor=box.fill)
        axes.add_patch(shape)
        write(left + box.x, box.y + BOX_HEIGHT / 2, box.text, FONT_SIZE)


def _curve(points: list[tuple[float, float]]) -> Any:
    """The wire as matplotlib's path of cubic curves."""
    from matplotlib.path import Path as Curve

    vertices = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        vertices += [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1)]
    return Curve(vertices, [Curve.MOVETO, *[Curve.CURVE4] * (len(vertices) - 1)])
