"""Draw graphs of boxes and edges, as SVG for notebooks and in matplotlib.

Coordinates are pixels, x to the right and y down. An edge leaves a box at its bottom and enters
another at its top. It is a cubic curve from each of its points to the next, vertical at each:

        +------ x ------+   y
        |     text      |
        +------ * ------+   y + BOX_HEIGHT
                |
                 `--.                       * the points of an edge
                     |
                     *      in a lane between other boxes
                     |
                     V
        +----------- * -----------+
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
CHARACTER_WIDTH = 7.0
FONT_SIZE, TITLE_SIZE, PIXELS_PER_INCH = 11, 14, 100
GREY, LINE = "#666666", 1.5
MARK, MARK_FILL, MARK_LINE = "#111111", "#ffe066", 3.0  # for changes


class Box(NamedTuple):
    """Hold a box with one line of text; x is its centre and y its top."""

    x: float
    y: float
    width: float
    text: str
    fill: str = "#ffffff"
    border: str = GREY
    line: float = LINE

    def marked(self) -> "Box":
        """Return it marked as changed."""
        return self._replace(fill=MARK_FILL, border=MARK, line=MARK_LINE)


class Edge(NamedTuple):
    """Hold a smooth line through points, vertical at each, that ends in an arrow head."""

    points: list[tuple[float, float]]
    colour: str
    line: float = LINE

    def marked(self) -> "Edge":
        """Return it marked as changed."""
        return self._replace(colour=MARK, line=MARK_LINE)


class Picture(NamedTuple):
    """Hold everything that is drawn of a graph."""

    title: str
    width: float
    height: float
    boxes: list[Box]
    edges: list[Edge]


def fit_width(title: str, boxes: Sequence[Box], edges: Sequence[Edge], height: float) -> Picture:
    """Return the picture that is as wide as its boxes, its edges and its title need."""
    ends = [box.x + side * box.width / 2 for box in boxes for side in (-1, 1)]
    ends += [x for edge in edges for x, _ in edge.points]
    title_width = len(title) * CHARACTER_WIDTH * TITLE_SIZE / FONT_SIZE
    width = max(max(ends) - min(ends), title_width) + 2 * MARGIN
    left = (min(ends) + max(ends) - width) / 2
    moved = [edge._replace(points=[(x - left, y) for x, y in edge.points]) for edge in edges]
    return Picture(title, width, height, [box._replace(x=box.x - left) for box in boxes], moved)


def without_title(picture: Picture) -> Picture:
    """Return the picture without its title and the space above."""
    boxes = [box._replace(y=box.y - TITLE_HEIGHT) for box in picture.boxes]
    edges = [
        edge._replace(points=[(x, y - TITLE_HEIGHT) for x, y in edge.points])
        for edge in picture.edges
    ]
    return fit_width("", boxes, edges, picture.height - TITLE_HEIGHT)


def svg(picture: Picture) -> str:
    """Return a picture as inline SVG."""
    title, width, height = escaping.escape(picture.title), picture.width, picture.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.1f} {height:.1f}" '
        'style="max-width:100%;height:auto;background:#ffffff" '
        f'font-family="sans-serif" font-size="{FONT_SIZE}" text-anchor="middle">'
        f"<title>{title}</title>"
        f'<text x="{width / 2:.1f}" y="{MARGIN + 8}" font-size="{TITLE_SIZE}">{title}</text>'
        f"{''.join(map(_svg_edge, picture.edges))}{''.join(map(_svg_box, picture.boxes))}</svg>"
    )


def side_by_side(pictures: Sequence[Picture]) -> str:
    """Return pictures as inline SVG, in a row if the page is wide enough."""
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(map(svg, pictures))}</div>'


def _svg_edge(edge: Edge) -> str:
    (x, y), end = edge.points[0], edge.points[-1]
    path = f"M{x:.1f} {y:.1f}" + "".join(
        f"C{x0:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {(y0 + y1) / 2:.1f} {x1:.1f} {y1:.1f}"
        for (x0, y0), (x1, y1) in pairwise(edge.points)
    )
    head = f"M{end[0]:.1f} {end[1]:.1f}l-3.5 -7h7z"
    return (
        f'<path d="{path}" fill="none" stroke="{edge.colour}" stroke-width="{edge.line}"/>'
        f'<path d="{head}" fill="{edge.colour}"/>'
    )


def _svg_box(box: Box) -> str:
    return (
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{BOX_HEIGHT}" rx="4" fill="{box.fill}" stroke="{box.border}" '
        f'stroke-width="{box.line}"/>'
        f'<text x="{box.x:.1f}" y="{box.y + 16:.1f}" fill="#111111">'
        f"{escaping.escape(box.text)}</text>"
    )


def figure(pictures: Sequence[Picture], path: str | Path | None = None) -> "Figure":
    """Draw pictures side by side in a matplotlib figure; write it to `path` if given."""
    from gpipe_jax.utils.figures import new_figure, save_figure

    width, height = sum(p.width for p in pictures), max(p.height for p in pictures)
    figure = new_figure(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    figure.set_layout_engine("none")  # the layout is done
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    left = 0.0
    for picture in pictures:
        draw(axes, picture, left)
        left += picture.width
    return save_figure(figure, path)


def draw(axes: "Axes", picture: Picture, left: float = 0.0, scale: float = 1.0) -> None:
    """Draw a picture in axes whose unit is a pixel; scale texts and lines by `scale`."""
    from matplotlib import patches

    def write(x: float, y: float, text: str, size: float) -> None:
        points = scale * _points(size)
        axes.text(x, y, text, ha="center", va="center", fontsize=points, parse_math=False)

    if picture.title:
        write(left + picture.width / 2, MARGIN + 4, picture.title, TITLE_SIZE)
    for edge in picture.edges:
        points, width = [(left + x, y) for x, y in edge.points], scale * _points(edge.line)
        curve = patches.PathPatch(_curve(points), fill=False, edgecolor=edge.colour, lw=width)
        axes.add_patch(curve)
        x, y = points[-1]
        head = [(x, y), (x - 3.5, y - 7), (x + 3.5, y - 7)]
        axes.add_patch(patches.Polygon(head, facecolor=edge.colour, edgecolor="none"))
    rounded = "round,pad=0,rounding_size=4"
    for box in picture.boxes:
        corner = (left + box.x - box.width / 2, box.y)
        shape = patches.FancyBboxPatch(corner, box.width, BOX_HEIGHT, boxstyle=rounded)
        width = scale * _points(box.line)
        shape.set(edgecolor=box.border, facecolor=box.fill, linewidth=width)
        axes.add_patch(shape)
        write(left + box.x, box.y + BOX_HEIGHT / 2, box.text, FONT_SIZE)


def _points(pixels: float) -> float:
    return pixels * 72 / PIXELS_PER_INCH


def _curve(points: list[tuple[float, float]]) -> Any:
    """Return an edge as a matplotlib path of cubic curves."""
    from matplotlib.path import Path as Curve

    vertices = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        vertices += [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1)]
    return Curve(vertices, [Curve.MOVETO, *[Curve.CURVE4] * (len(vertices) - 1)])
