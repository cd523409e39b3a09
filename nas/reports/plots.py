"""Plot a run from its store, also while it is running; needs matplotlib."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from gpipe_jax.utils.figures import new_figure, save_figure
from nas.storage import queries
from nas.storage.queries import RUNNING
from nas.storage.reader import Reader

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


def overview(reader: Reader, path: str | Path | None = None) -> "Figure":
    """Plot the best so far, the population, the cache, the workers, and a front for each cost.

    Args:
        reader: The store of the run.
        path: File to write the figure to, or None.
    """
    costs = queries.cost_metrics(reader)
    figure = new_figure(11, 7 + 3.4 * ((len(costs) + 1) // 2))
    grid = figure.subplots(2 + (len(costs) + 1) // 2, 2).ravel()
    for draw, axes in zip((best_so_far, population, cache, workers), grid, strict=False):
        draw(axes, reader)
    for cost, axes in zip(costs, grid[4:], strict=False):
        pareto(axes, reader, cost)
    for axes in grid[4 + len(costs) :]:
        axes.set_axis_off()
    figure.suptitle(reader.study().name, parse_math=False)
    return save_figure(figure, path)


def best_so_far(axes: "Axes", reader: Reader) -> None:
    """Plot each candidate's fitness, and the best until then."""
    study, course = reader.study(), queries.progress(reader)
    counts = range(1, len(course.fitness) + 1)
    every = max(1, len(counts) // MAX_POINTS)
    axes.plot(counts[::every], course.fitness[::every], ".", color=GREY, ms=3, label="a candidate")
    axes.step(counts, course.best, where="post", color=BLUE, lw=1.8, label="best so far")
    first = study.settings["population"]
    if study.settings["algorithm"] != "random" and first < len(counts):
        axes.axvline(first + 0.5, color=ORANGE, lw=1, ls=":", label="evolution begins")
    hidden = _focus(axes, course.fitness, maximise=study.maximise)
    _finish(axes, f"best so far{hidden}", "candidates with a fitness", "fitness")


def population(axes: "Axes", reader: Reader) -> None:
    """Plot the members' fitness by age: how many members were trained after them."""
    members = queries.ages(reader)
    axes.plot([m.age for m in members], [m.fitness for m in members], "o", color=BLUE, ms=4)
    label = "age: members trained since"
    _finish(axes, f"population, {len(members)} members", label, "fitness")


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


def pareto(axes: "Axes", reader: Reader, cost: str) -> None:
    """Plot candidates by a cost and their fitness, and the front that none beats in both."""
    rows = [
        row
        for row in reader.candidates("state = 'done'")
        if math.isfinite(row.metrics.get(cost, math.nan))
    ]
    if not rows:  # for example if no network fits into the device
        title = f"Pareto front: no candidate has a finite {cost}"
        return _finish(axes, title, cost, "fitness")
    every = max(1, len(rows) // MAX_POINTS)
    points = [(row.metrics[cost], row.fitness or 0.0) for row in rows[::every]]
    axes.plot(*zip(*points, strict=True), ".", color=GREY, ms=3, label="a candidate")
    front = [(row.metrics[cost], row.fitness or 0.0) for row in queries.pareto_front(reader, cost)][
        ::-1
    ]
    axes.step(*zip(*front, strict=True), where="post", color=ORANGE, lw=1.4)
    axes.plot(*zip(*front, strict=True), "o", color=ORANGE, ms=4, label="Pareto front")
    maximise = reader.study().maximise
    worst = min(front, key=lambda point: point[1] if maximise else -point[1])[1]
    hidden = _focus(axes, [value for _, value in points], maximise=maximise, keep=worst)
    _finish(axes, f"Pareto front: {len(front)} candidates{hidden}", cost, "fitness")


def _focus(axes: "Axes", values: list[float], *, maximise: bool, keep: float | None = None) -> str:
    """Set limits that leave out values much worse than most, and than `keep`.

    Returns:
        A note on how many are left out, or an empty text.
    """
    order = sorted(values, reverse=not maximise)
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
    hidden = sum(value < worst if maximise else value > worst for value in order)
    return f" ({hidden} worse ones not shown)"


def _finish(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _natural(name: str) -> tuple[str, int]:
    """Return a sort key by which `thread_10` comes after `thread_9`."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)
