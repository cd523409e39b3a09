"""Draw a candidate's ancestors, and what each of them changed.

Architectures are drawn if their space has pictures; see `nas.spaces.pictures`.
"""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.figures import new_figure, save_figure
from gpipe_jax.utils.graph_drawing import Picture
from nas.reports import plots
from nas.spaces.pictures import StoredArchitecture, differences, pictures, read
from nas.spaces.space import Space
from nas.storage.reader import CandidateRow, Reader

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ANCESTORS = 60  # that are drawn


class Step(NamedTuple):
    """Hold an ancestor and its differences from its parent."""

    row: CandidateRow
    lines: list[str]  # one for each difference
    pictures: list[Picture]  # all cells of the first ancestor, then the cells that changed


def steps(reader: Reader, number: int, space: Space[Any] | None = None) -> list[Step]:
    """Return the lineage of a candidate, the random ancestor first."""
    name, lineage = reader.study().space, []
    parent: StoredArchitecture | None = None
    for row in reader.lineage(number):
        architecture = read(name, row.architecture, space)
        if parent is None:
            lineage.append(_first_step(row, architecture))
        else:
            lineage.append(_next_step(row, architecture, parent))
        parent = architecture
    return lineage


def _first_step(row: CandidateRow, architecture: StoredArchitecture) -> Step:
    cells = pictures(architecture)
    return Step(row, ["random"] if cells else [f"random: {architecture.text}"], cells)


def _next_step(
    row: CandidateRow, architecture: StoredArchitecture, parent: StoredArchitecture
) -> Step:
    changed, old = pictures(architecture, parent), pictures(parent)
    if len(changed) == len(old):  # a space may have architectures of several sizes
        changed = [marked for marked, before in zip(changed, old, strict=True) if marked != before]
    return Step(row, differences(architecture, parent) or ["no change"], changed)


def shortened(steps: list[Step]) -> tuple[list[Step], str]:
    """Return the random ancestor and the last ones, and a note on those that are left out."""
    left_out = len(steps) - MAX_ANCESTORS
    if left_out <= 0:
        return steps, ""
    note = f"; {left_out} after the first are not drawn"
    return [steps[0], *steps[1 + left_out :]], note


def heading(row: CandidateRow) -> str:
    """Return a candidate's number and fitness, or its state if it has no fitness."""
    return f"#{row.id}, " + (row.state if row.fitness is None else f"fitness {row.fitness:.6g}")


# --- as a figure ----------------------------------------------------------------------------------

COLUMNS, WIDTH, GAP = 3, 3.7, 0.2  # panels in a row; width of a panel and of a gap in inches
MAX_SCALE = 0.75  # of a picture
LINE_HEIGHT, LINE_CHARACTERS, MAX_LINES = 0.14, 64, 5  # inches; of each text of a panel
CURVE_HEIGHT = 2.2  # inches, with titles and labels


class Panel(NamedTuple):
    """Hold texts and a picture below them; sizes are in inches."""

    texts: list[str]
    picture: Picture | None

    @property
    def scale(self) -> float:
        """Return the factor by which the picture is scaled."""
        if self.picture is None:
            return 0.0
        return min(MAX_SCALE, WIDTH / (self.picture.width / graph_drawing.PIXELS_PER_INCH))

    @property
    def picture_size(self) -> tuple[float, float]:
        """Return the width and height of the scaled picture."""
        if self.picture is None:
            return 0.0, 0.0
        scale = self.scale / graph_drawing.PIXELS_PER_INCH
        return self.picture.width * scale, self.picture.height * scale

    @property
    def height(self) -> float:
        """Return the height with the texts."""
        return LINE_HEIGHT * len(self.texts) + self.picture_size[1]


def figure(
    reader: Reader,
    number: int,
    path: str | Path | None = None,
    space: Space[Any] | None = None,
) -> "Figure":
    """Draw the ancestors of a candidate, the random one first, and their differences.

    Args:
        reader: The store of the run.
        number: Number of the candidate.
        path: File to write the figure to, or None.
        space: The search space, if it is known.
    """
    ancestors = steps(reader, number, space)
    shown, note = shortened(ancestors)
    panels = [panel for step in shown for panel in _panels(step)]
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [max(panel.height for panel in row) + GAP for row in rows]
    total = CURVE_HEIGHT + sum(heights)
    drawing = new_figure(COLUMNS * (WIDTH + GAP) + GAP, total)
    drawing.set_layout_engine("none")
    bottom, height = total - CURVE_HEIGHT + 0.6, CURVE_HEIGHT - 0.95
    axes = drawing.add_axes((0.06, bottom / total, 0.92, height / total))
    _draw_curve(axes, ancestors, note)
    y = total - CURVE_HEIGHT
    for row, height in zip(rows, heights, strict=True):
        for k, panel in enumerate(row):
            _draw_panel(drawing, panel, GAP + k * (WIDTH + GAP), y)
        y -= height
    return save_figure(drawing, path)


def _draw_curve(axes: "Axes", steps: list[Step], note: str) -> None:
    """Plot the fitness of each ancestor."""
    rows = [step.row for step in steps]
    points = [(i, row.fitness) for i, row in enumerate(rows) if row.fitness is not None]
    values = plots.drawable([fitness for _, fitness in points])
    axes.plot([i for i, _ in points], values, ".-", color=plots.BLUE, ms=6, lw=1.2)
    every = 1 + len(rows) // 24
    ticks = range(len(rows) - 1, -1, -every)
    axes.set_xticks(ticks, [f"#{rows[k].id}" for k in ticks], fontsize=7)
    title = f"lineage of candidate {rows[-1].id}: {len(rows)} generations{note}"
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("fitness", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3)


def _panels(step: Step) -> list[Panel]:
    """Return a panel for each picture, or one without; a single one has all texts."""
    title = heading(step.row)
    if len(step.pictures) > 1:
        return [
            Panel([title, picture.title], graph_drawing.without_title(picture))
            for picture in step.pictures
        ]
    texts = [title]
    for line in step.lines:
        texts += textwrap.wrap(line, LINE_CHARACTERS)[:MAX_LINES]
    if not step.pictures:
        return [Panel(texts, None)]
    return [Panel(texts, graph_drawing.without_title(step.pictures[0]))]


def _draw_panel(figure: "Figure", panel: Panel, x: float, y: float) -> None:
    """Draw a panel whose upper left corner is at x, y: inches from the lower left of the figure."""
    figure_width, figure_height = figure.get_size_inches()
    for i, text in enumerate(panel.texts):
        size, weight = (8, "bold") if i == 0 else (7, "normal")
        position = (x / figure_width, (y - LINE_HEIGHT * i) / figure_height)
        figure.text(*position, text, va="top", parse_math=False, fontsize=size, fontweight=weight)
    picture = panel.picture
    if picture is None:
        return
    width, height = panel.picture_size
    corner = x / figure_width, (y - panel.height) / figure_height
    axes = figure.add_axes((*corner, width / figure_width, height / figure_height))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_axis_off()
    graph_drawing.draw(axes, picture, scale=panel.scale)
