"""Boxes and wires: one layout, drawn as SVG for notebooks and in matplotlib.

Coordinates are pixels, x to the right and y down.
"""

import html as escaping
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOX_HEIGHT, MARGIN, TITLE_HEIGHT = 24.0, 16.0, 30.0
CHARACTER = 7.0  # the width of one
FONT_SIZE, TITLE_SIZE, PIXELS_PER_INCH = 11, 14, 100
GREY, LINE = "#666666", 1.5
MARK, MARK_FILL, MARK_LINE = "#111111", "#ffe066", 3.0  # of what has changed


class Box(NamedTuple):
    """A box with one line of text; x is its centre and y its top."""

    x: float
    y: float
    width: float
    text: str
    fill: str = "#ffffff"
    edge: str = GREY
    line: float = LINE

    def marked(self) -> "Box":
        """The same, as one that has changed."""
        return self._replace(fill=MARK_FILL, edge=MARK, line=MARK_LINE)


class Edge(NamedTuple):
    """A smooth line through points, vertical at each, that ends in an arrow head."""

    points: list[tuple[float, float]]
    colour: str
    line: float = LINE

    def marked(self) -> "Edge":
        """The same, as one that has changed."""
        return self._replace(colour=MARK, line=MARK_LINE)


class Picture(NamedTuple):
    """All that is drawn of a graph."""

    title: str
    width: float
    height: float
    boxes: list[Box]
    wires: list[Edge]


def fitted(title: str, boxes: Sequence[Box], wires: Sequence[Edge], height: float) -> Picture:
    """The picture that is as wide as these and its title need."""
    ends = [box.x + side * box.width / 2 for box in boxes for side in (-1, 1)]
    ends += [x for wire in wires for x, _ in wire.points]
    title_width = len(title) * CHARACTER * TITLE_SIZE / FONT_SIZE
    width = max(max(ends) - min(ends), title_width) + 2 * MARGIN
    left = (min(ends) + max(ends) - width) / 2
    moved = [wire._replace(points=[(x - left, y) for x, y in wire.points]) for wire in wires]
    return Picture(title, width, height, [box._replace(x=box.x - left) for box in boxes], moved)


def without_title(drawn: Picture) -> Picture:
    """The same without its title, nor the room for it."""
    boxes = [box._replace(y=box.y - TITLE_HEIGHT) for box in drawn.boxes]
    wires = [
        wire._replace(points=[(x, y - TITLE_HEIGHT) for x, y in wire.points])
        for wire in drawn.wires
    ]
    return fitted("", boxes, wires, drawn.height - TITLE_HEIGHT)


def svg(drawn: Picture) -> str:
    """The picture as inline SVG."""
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


def side_by_side(pictures: Sequence[Picture]) -> str:
    """Pictures as inline SVG, in a row where the page is wide enough."""
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(map(svg, pictures))}</div>'


def _svg_wire(wire: Edge) -> str:
    (x, y), end = wire.points[0], wire.points[-1]
    path = f"M{x:.1f} {y:.1f}" + "".join(
        f"C{x0:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {y1:.1f}"
        for (x0, y0), (x1, y1) in pairwise(wire.points)
    )
    head = f"M{end[0]:.1f} {end[1]:.1f}l-3.5 -7h7z"
    return (
        f'<path d="{path}" fill="none" stroke="{wire.colour}" stroke-width="{wire.line}"/>'
        f'<path d="{head}" fill="{wire.colour}"/>'
    )


def _svg_box(box: Box) -> str:
    return (
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{BOX_HEIGHT}" rx="4" fill="{box.fill}" stroke="{box.edge}" '
        f'stroke-width="{box.line}"/>'
        f'<text x="{box.x:.1f}" y="{box.y + 16:.1f}" fill="#111111">'
        f"{escaping.escape(box.text)}</text>"
    )


def figure(pictures: Sequence[Picture], path: str | Path | None = None) -> "Figure":
    """Pictures side by side, in a matplotlib figure; written to `path` where given."""
    from gpipe_jax.utils.figures import blank, saved

    width, height = sum(d.width for d in pictures), max(d.height for d in pictures)
    drawing = blank(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    drawing.set_layout_engine("none")  # the layout is made already
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    left = 0.0
    for drawn in pictures:
        draw(axes, drawn, left)
        left += drawn.width
    return saved(drawing, path)


def draw(axes: "Axes", drawn: Picture, left: float = 0.0, scale: float = 1.0) -> None:
    """Draw a picture in axes whose unit is its pixel; texts and lines are `scale` as large."""
    from matplotlib import patches

    def write(x: float, y: float, text: str, size: float) -> None:
        points = scale * _points(size)
        axes.text(x, y, text, ha="center", va="center", fontsize=points, parse_math=False)

    if drawn.title:
        write(left + drawn.width / 2, MARGIN + 4, drawn.title, TITLE_SIZE)
    for wire in drawn.wires:
        points, width = [(left + x, y) for x, y in wire.points], scale * _points(wire.line)
        lines = {"edgecolor": wire.colour, "lw": width}
        axes.add_patch(patches.PathPatch(_curve(points), fill=False, **lines))
        x, y = points[-1]
        head = [(x, y), (x - 3.5, y - 7), (x + 3.5, y - 7)]
        axes.add_patch(patches.Polygon(head, facecolor=wire.colour, edgecolor="none"))
    rounded = "round,pad=0,rounding_size=4"
    for box in drawn.boxes:
        corner = (left + box.x - box.width / 2, box.y)
        shape = patches.FancyBboxPatch(corner, box.width, BOX_HEIGHT, boxstyle=rounded)
        width = scale * _points(box.line)
        shape.set(edgecolor=box.edge, facecolor=box.fill, linewidth=width)
        axes.add_patch(shape)
        write(left + box.x, box.y + BOX_HEIGHT / 2, box.text, FONT_SIZE)


def _points(pixels: float) -> float:
    return pixels * 72 / PIXELS_PER_INCH


def _curve(points: list[tuple[float, float]]) -> Any:
    """The wire as matplotlib's path of cubic curves."""
    from matplotlib.path import Path as Curve

    vertices = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        vertices += [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1)]
    return Curve(vertices, [Curve.MOVETO, *[Curve.CURVE4] * (len(vertices) - 1)])
