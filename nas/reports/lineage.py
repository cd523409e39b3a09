"""Drawings of architectures as a store has them, and of what differs between two.

The spaces of this package have pictures; those of others are shown as they write themselves.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.figures import new_figure, save_figure
from gpipe_jax.utils.graph_drawing import Picture
from nas.reports import lineage, plots
from nas.spaces.pictures import StoredArchitecture, differences, pictures, read
from nas.storage.reader import CandidateRow, Reader

MOST = 60  # ancestors that are drawn


class Step(NamedTuple):
    """An ancestor, and what is other in it than in its parent."""

    row: CandidateRow
    lines: list[str]  # in words
    drawn: list[Picture]  # both cells of the first ancestor, then the cells that changed


def steps(reader: Reader, number: int) -> list[Step]:
    """The lineage of a candidate, the random ancestor first."""
    space, found = reader.study().space, []
    before: StoredArchitecture | None = None
    for row in reader.lineage(number):
        one = read(space, row.architecture)
        found.append(_step(row, one, before))
        before = one
    return found


def _step(row: CandidateRow, one: StoredArchitecture, before: StoredArchitecture | None) -> Step:
    drawn = pictures(one, before)
    if before is None:
        return Step(row, ["random"] if drawn else [f"random: {one.text}"], drawn)
    old = pictures(before)
    changed = [new for new, was in zip(drawn, old, strict=True) if new != was]
    return Step(row, differences(one, before) or ["nothing has changed"], changed)


def drawn(steps: list[Step]) -> tuple[list[Step], str]:
    """The random ancestor and the last ones, no more than can be looked at; and a note of that."""
    if len(steps) <= MOST:
        return steps, ""
    note = f", of which {len(steps) - MOST} after the first are not drawn"
    return [steps[0], *steps[1 - MOST :]], note


def heading(row: CandidateRow) -> str:
    """A candidate's number and fitness."""
    return f"#{row.id}, " + (row.state if row.fitness is None else f"fitness {row.fitness:.6g}")


COLUMNS, WIDTH, GAP = 3, 3.7, 0.2  # of the panels, in inches


LARGEST = 0.75  # scale of a picture


LINE, CHARACTERS, MOST_LINES = 0.14, 64, 5


CURVE = 2.2  # height of the curve, with what is around it


class Panel(NamedTuple):
    """Texts, and a picture under them; sizes in inches."""

    texts: list[str]
    drawn: Picture | None

    @property
    def scale(self) -> float:
        """Inches of the picture for each of its own."""
        if self.drawn is None:
            return 0.0
        return min(LARGEST, WIDTH / (self.drawn.width / graph_drawing.PIXELS_PER_INCH))

    @property
    def picture_height(self) -> float:
        """In inches."""
        height = self.drawn.height if self.drawn else 0.0
        return height / graph_drawing.PIXELS_PER_INCH * self.scale

    @property
    def height(self) -> float:
        """In inches, with the texts."""
        return LINE * len(self.texts) + self.picture_height


def figure(reader: Reader, number: int, path: str | Path | None = None) -> "Figure":
    """Ancestors of a candidate, the random one first, each with what differs from its parent."""
    steps = lineage.steps(reader, number)
    shown, note = lineage.drawn(steps)
    panels = [panel for step in shown for panel in _panels(step)]
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    whole = CURVE + sum(max(panel.height for panel in row) + GAP for row in rows)
    drawn = new_figure(COLUMNS * (WIDTH + GAP) + GAP, whole)
    drawn.set_layout_engine("none")
    _curve(
        drawn.add_axes((0.06, 1 - (CURVE - 0.6) / whole, 0.92, (CURVE - 0.95) / whole)), steps, note
    )
    y = whole - CURVE
    for row in rows:
        for k, panel in enumerate(row):
            _draw(drawn, panel, GAP + k * (WIDTH + GAP), y)
        y -= max(panel.height for panel in row) + GAP
    return save_figure(drawn, path)


def _curve(axes: "Axes", steps: list[Step], note: str) -> None:
    rows = [step.row for step in steps]
    known = [(i, row.fitness) for i, row in enumerate(rows) if row.fitness is not None]
    axes.plot([i for i, _ in known], [f for _, f in known], ".-", color=plots.BLUE, ms=6, lw=1.2)
    every = 1 + len(rows) // 24
    ticks = range(len(rows) - 1, -1, -every)
    axes.set_xticks(ticks, [f"#{rows[k].id}" for k in ticks], fontsize=7)
    title = f"lineage of candidate {rows[-1].id}: {len(rows)} generations{note}"
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("fitness", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3)


def _panels(step: Step) -> list[Panel]:
    """One for each picture; the texts are on the first."""
    texts = [lineage.heading(step.row)]
    for line in step.lines:
        texts += textwrap.wrap(line, CHARACTERS)[:MOST_LINES]
    if len(step.drawn) < 2:
        return [Panel(texts, graph_drawing.without_title(one)) for one in step.drawn] or [
            Panel(texts, None)
        ]
    return [Panel([texts[0], one.title], graph_drawing.without_title(one)) for one in step.drawn]


def _draw(figure: "Figure", panel: Panel, x: float, y: float) -> None:
    """A panel whose upper left corner is there, in inches from the figure's lower left."""
    width, height = figure.get_size_inches()
    for i, text in enumerate(panel.texts):
        size, weight = (7, "normal") if i else (8, "bold")
        place = (x / width, (y - LINE * i) / height)
        figure.text(*place, text, va="top", parse_math=False, fontsize=size, fontweight=weight)
    if panel.drawn is None:
        return
    size = (panel.drawn.width / graph_drawing.PIXELS_PER_INCH * panel.scale, panel.picture_height)
    bottom = y - panel.height
    axes = figure.add_axes((x / width, bottom / height, size[0] / width, size[1] / height))
    axes.set(xlim=(0, panel.drawn.width), ylim=(panel.drawn.height, 0))
    axes.set_axis_off()
    graph_drawing.draw(axes, panel.drawn, scale=panel.scale)
