"""Plot a run from its store, also while it is running; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpipe_jax.utils.figures import new_figure, save_figure
from nas.choices import Direction
from nas.storage import queries
from nas.storage.queries import RUNNING
from nas.storage.reader import CandidateRow, Reader

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f77b4", "#d9660a", "#9a9a9a"
OUTCOMES = {
    "ok": "#7fb3e6",
    "running": "#b9d8b4",
    "lost": "#cccccc",
    "exception": "#c0282a",
    "timeout": "#8155b0",
    "nan": "#c2459b",
    "out_of_memory": "#d9660a",
    "worker_death": "#333333",
}
MAX_POINTS = 5000  # more points are thinned out
MAX_HIDDEN = 0.15  # share of the points, the worst, that may lie outside the axes
MAX_NAME = 40  # characters of a metric's name in a title
LARGEST = 1e300  # of a value on an axis, whose length must be finite too


def overview(reader: Reader, path: str | Path | None = None) -> "Figure":
    """Plot the best so far, the population, the cache, the workers, and the Pareto fronts.

    Args:
        reader: The store of the run.
        path: File to write the figure to, or None.
    """
    fronts = queries.front_metrics(reader)
    figure = new_figure(11, 7 + 3.4 * ((len(fronts) + 1) // 2))
    grid = figure.subplots(2 + (len(fronts) + 1) // 2, 2).ravel()
    for draw, axes in zip((best_so_far, population, cache, workers), grid, strict=False):
        draw(axes, reader)
    for (metric, direction), axes in zip(fronts.items(), grid[4:], strict=False):
        pareto(axes, reader, metric, direction)
    for axes in grid[4 + len(fronts) :]:
        axes.set_axis_off()
    figure.suptitle(reader.study().name, parse_math=False)
    return save_figure(figure, path)


def best_so_far(axes: "Axes", reader: Reader) -> None:
    """Plot each candidate's fitness, and the best until then."""
    study, course = reader.study(), queries.progress(reader)
    counts = range(1, len(course.fitness) + 1)
    every = max(1, len(counts) // MAX_POINTS)
    shown, best = drawable(course.fitness), drawable(course.best)
    axes.plot(counts[::every], shown[::every], ".", color=GREY, ms=3, label="a candidate")
    axes.step(counts, best, where="post", color=BLUE, lw=1.8, label="best so far")
    first = study.settings["population"]
    if study.settings["algorithm"] != "random" and first < len(counts):
        axes.axvline(first + 0.5, color=ORANGE, lw=1, ls=":", label="evolution begins")
    notes = [_left_out(shown), _focus(axes, shown, maximise=study.maximise)]
    _finish(axes, "best so far", "candidates with a fitness", "fitness", notes)


def population(axes: "Axes", reader: Reader) -> None:
    """Plot the members' fitness by age: how many members were trained after them."""
    members = queries.ages(reader)
    shown = drawable([m.fitness for m in members])
    axes.plot([m.age for m in members], shown, "o", color=BLUE, ms=4)
    label = "age: members trained since"
    _finish(axes, f"population, {len(members)} members", label, "fitness", [_left_out(shown)])


def cache(axes: "Axes", reader: Reader) -> None:
    """Plot evaluations against candidates with a fitness: the cache saved the gap."""
    evaluations = queries.progress(reader).evaluations
    candidates = range(1, len(evaluations) + 1)
    saved = len(evaluations) - evaluations[-1] if evaluations else 0
    axes.plot(candidates, candidates, color=GREY, lw=1.2, label="candidates")
    axes.plot(candidates, evaluations, color=BLUE, lw=1.8, label="evaluations for them")
    axes.fill_between(
        candidates, evaluations, candidates, color=ORANGE, alpha=0.25, lw=0, label="saved"
    )
    share = f" ({saved / len(evaluations):.0%})" if evaluations else ""
    title = f"cache: {saved} of {len(evaluations)} saved{share}"
    _finish(axes, title, "candidates with a fitness", "number")


def workers(axes: "Axes", reader: Reader) -> None:
    """Draw a row for each worker, and a bar for each evaluation; running ones share rows."""
    bars, drivers, left_out = queries.timeline(reader)
    names = sorted({bar.worker for bar in bars}, key=_natural)
    running = sum(bar.worker == RUNNING for bar in bars)
    for outcome, colour in OUTCOMES.items():
        for k, name in enumerate(names):
            spans = [
                (bar.start, bar.end - bar.start)
                for bar in bars
                if (bar.worker, bar.outcome) == (name, outcome)
            ]
            if spans:
                axes.broken_barh(spans, (k - 0.4, 0.8), color=colour, lw=0.4)
        if any(bar.outcome == outcome for bar in bars):
            axes.plot([], [], "s", color=colour, label=outcome.replace("_", " "))
    shown = min((bar.start for bar in bars), default=0.0)
    for time in drivers[1:]:
        if time > shown:
            axes.axvline(time, color="black", lw=0.8, ls=":")
    every = 1 + len(names) // 32
    labels = [f"{running} {name}" if name == RUNNING else name for name in names[::every]]
    axes.set_yticks(range(0, len(names), every), labels, fontsize=7, parse_math=False)
    axes.set_ylim(len(names) * 1.15 - 0.2, -0.6)  # with room for the legend
    title = f"workers, the last {len(bars)} evaluations" if left_out else "workers"
    _finish(axes, title, "seconds running", "")
    if bars:
        axes.legend(fontsize=6, loc="lower right", ncols=8, handletextpad=0.1, columnspacing=0.8)


def pareto(axes: "Axes", reader: Reader, metric: str, direction: Direction = "min") -> None:
    """Plot candidates by a metric and their fitness, and the front that none beats in both."""
    rows = list(reader.candidates("state = 'done'"))
    finite = [row for row in rows if _is_drawable(row, metric)]
    name = shorten(metric)
    x = name if direction == "min" else f"{name} (more is better)"
    if not finite:  # for example if no network fits into the device
        return _finish(axes, f"Pareto front: no candidate has a finite {name}", x, "fitness", [])
    every = max(1, len(finite) // MAX_POINTS)
    points = [(row.metrics[metric], row.fitness or 0.0) for row in finite[::every]]
    axes.plot(*zip(*points, strict=True), ".", color=GREY, ms=3, label="a candidate")
    front = [
        (row.metrics[metric], row.fitness or 0.0)
        for row in queries.pareto_front(reader, metric, direction)
        if _is_drawable(row, metric)
    ][::-1]
    where = "post" if direction == "min" else "pre"
    axes.step(*zip(*front, strict=True), where=where, color=ORANGE, lw=1.4)
    axes.plot(*zip(*front, strict=True), "o", color=ORANGE, ms=4, label="Pareto front")
    maximise = reader.study().maximise
    worst = min(front, key=lambda point: point[1] if maximise else -point[1])[1]
    notes = [
        _note(len(rows) - len(finite), "without a finite value"),
        _focus(axes, [value for _, value in points], maximise=maximise, keep=worst),
    ]
    _finish(axes, f"Pareto front: {len(front)} candidates", x, "fitness", notes)


def drawable(values: Sequence[float]) -> list[float]:
    """Replace by NaN, which is not drawn, what has no place on an axis."""
    return [value if abs(value) < LARGEST else math.nan for value in values]


def shorten(name: str) -> str:
    """Return a name on one line, with dots for what is beyond the place of a label."""
    line = " ".join(name.split())
    return line if len(line) <= MAX_NAME else f"{line[: MAX_NAME - 3]}..."


def _is_drawable(row: CandidateRow, metric: str) -> bool:
    values = [row.fitness or 0.0, row.metrics.get(metric, math.nan)]
    return not any(map(math.isnan, drawable(values)))


def _left_out(values: Sequence[float]) -> str:
    return _note(sum(map(math.isnan, values)), "without a finite value")


def _note(count: int, what: str) -> str:
    return f"{count} {what} not shown" if count else ""


def _focus(
    axes: "Axes", values: Sequence[float], *, maximise: bool, keep: float | None = None
) -> str:
    """Set limits that leave out values much worse than most, and than `keep`.

    Returns:
        A note on how many are left out, or an empty text.
    """
    order = sorted((value for value in values if not math.isnan(value)), reverse=not maximise)
    k = int(len(order) * MAX_HIDDEN)
    if not k:
        return ""
    best, limit = order[-1], order[k]
    if keep is not None:
        limit = min(limit, keep) if maximise else max(limit, keep)
    if abs(best - order[0]) <= 3 * abs(best - limit):
        return ""
    margin = 0.06 * (best - limit)
    if not margin:
        return ""
    worst = limit - margin
    axes.set_ylim(min(worst, best + margin), max(worst, best + margin))
    return _note(sum(value < worst if maximise else value > worst for value in order), "worse ones")


def _finish(axes: "Axes", title: str, x: str, y: str, notes: Sequence[str] = ()) -> None:
    """Set title and labels; names of the user's are no formulas, whatever they contain."""
    added = ", ".join(note for note in notes if note)
    if added:
        title += f" ({added})"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _natural(name: str) -> tuple[str, int]:
    """Return a sort key by which `thread_10` comes after `thread_9`."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)
