"""Draw a schedule, or the curves of a run, with matplotlib.

Public: `schedule`, `curves`. Both import matplotlib when they are called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpipe_jax.schedules import simulation
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.utils.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {FORWARD: "#7fb3e6", BACKWARD: "#f2b36b"}
NAMES = {FORWARD: "forward", BACKWARD: "backward"}
_PALEST = 0.6  # the share of white in the colour of the last chunk, at most
_LABEL_INCHES = 0.085  # that a digit needs in a box
_MOST_IN_LEGEND = 8  # chunks


def schedule(schedule: Schedule, path: Path | None = None) -> "Figure":
    """Draw a schedule: a row for each device, a box for each forward and backward.

    The horizontal axis is time, in which a backward is three times as long as a forward (it repeats
    the forward), and a tick as long as its slowest operation, as in one program on all devices. The
    last stage's forward is part of its backward. The number in a box is its micro-batch; numbers
    that do not fit are left out. With several chunks on a device, boxes of later chunks are paler.

    Args:
        schedule: The schedule to draw.
        path: The image file to write, of any type that matplotlib knows. Default: none.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: Matplotlib is not installed.

    Example::

        gpipe.plots.schedule(gpipe.schedules.make("1f1b", 4, 8), Path("1f1b.png"))
    """
    K = schedule.num_devices
    times_TK = simulation.entry_times(schedule, *simulation.usual_times(schedule))
    ends_T = times_TK.max(axis=1).cumsum()
    starts_T = ends_T - times_TK.max(axis=1)
    width = min(max(6.0, 0.25 * ends_T[-1]), 24.0)
    height = min(max(1.2, 0.42 * K), 10.0)
    figure = new_figure(width, height + 1.5)
    axes = figure.subplots()
    inches = width / ends_T[-1]  # of the unit of time
    for op in COLOURS:
        for chunk in range(schedule.chunks):
            is_here = (schedule.table[..., 0] == op) & (schedule.table[..., 2] == chunk)
            entries = np.argwhere(is_here & (times_TK > 0))
            if not len(entries):
                continue
            duration = float(times_TK[*entries[0]])
            boxes = [(float(starts_T[t]), int(k), duration) for t, k in entries]
            _draw_boxes(axes, boxes, _colour(op, chunk, schedule.chunks), inches * duration > 0.1)
            digits = len(str(schedule.micro_batches - 1))
            if inches * duration > _LABEL_INCHES * digits and height / K > 0.15:
                for (start, k, _), (t, _) in zip(boxes, entries, strict=True):
                    middle, text = start + duration / 2, str(schedule.table[t, k, 1])
                    axes.text(middle, k, text, ha="center", va="center", fontsize=7)
    size = 8 + width / 6  # of texts, in points: a wide picture is shown smaller
    axes.set(xlim=(0, ends_T[-1]), ylim=(K - 0.4, -0.6), facecolor="#f3f3f3")
    axes.set_xlabel("time, in forwards of a device", fontsize=size)
    axes.set_ylabel("device", fontsize=size)
    axes.tick_params(labelsize=size)
    axes.set_yticks(range(0, K, -(-K // 16)))
    chunks = f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    axes.set_title(
        f"{schedule.kind}: {K} devices{chunks}, {schedule.micro_batches} micro-batches, "
        f"bubble {schedule.bubble_fraction:.1%} of the entries",
        fontsize=size + 1,
    )
    _add_legend(figure, schedule, size)
    return save_figure(figure, path)


def _draw_boxes(
    axes: "Axes", boxes: Sequence[tuple[float, int, float]], colour: str, has_edges: bool
) -> None:
    """Draw boxes of (start, row, length) as one object, since there may be many thousands."""
    from matplotlib.collections import PolyCollection

    corners = [
        [(x, k - 0.45), (x + length, k - 0.45), (x + length, k + 0.45), (x, k + 0.45)]
        for x, k, length in boxes
    ]
    edge, line = ("white", 0.8) if has_edges else ("none", 0.0)
    axes.add_collection(
        PolyCollection(corners, facecolors=colour, edgecolors=edge, linewidths=line)
    )


def _colour(operation: int, chunk: int, chunks: int) -> str:
    """Return the colour of an operation, the paler the later the chunk."""
    white, text = _PALEST * chunk / max(chunks - 1, 1), COLOURS[operation]
    parts = (int(text[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + white * (255 - part)):02x}" for part in parts)


def _add_legend(figure: "Figure", schedule: Schedule, size: float) -> None:
    """Explain the colours of the operations and, if there are several, of the chunks."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    V = schedule.chunks
    operations = [op for op in COLOURS if (schedule.table[..., 0] == op).any()]
    listed = range(V) if V <= _MOST_IN_LEGEND else (0, V // 2, V - 1)
    entries: dict[str, Any] = {NAMES[op]: Patch(facecolor=COLOURS[op]) for op in operations}
    if V > 1:
        for chunk in listed:
            patches = (Patch(facecolor=_colour(op, chunk, V)) for op in operations)
            entries[f"chunk {chunk}"] = tuple(patches)
    figure.legend(
        [*entries.values()],
        [*entries],
        loc="outside lower center",
        ncols=min(len(entries), 6),
        fontsize=size,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def curves(records: Sequence[dict], path: Path) -> None:
    """Draw loss and accuracy over the steps, in training and on held-out data.

    Args:
        records: The records of a run, as in its `metrics.jsonl`: dicts with "step" and any of
            "loss", "accuracy", "test_loss" and "test_accuracy".
        path: The image file to write.

    Raises:
        ImportError: Matplotlib is not installed.

    Example::

        gpipe.plots.curves([{"step": 1, "loss": 2.3}, {"step": 2, "loss": 2.1}], Path("loss.png"))
    """
    names = [
        name
        for name in ("loss", "accuracy")
        if any(name in record or f"test_{name}" in record for record in records)
    ]
    figure = new_figure(5.5 * len(names), 3.6)
    grid = figure.subplots(1, len(names), squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        for key, style in ((name, "-"), (f"test_{name}", "o-")):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                label = "held out" if key.startswith("test_") else "training"
                axes.plot(*zip(*points, strict=True), style, label=label, lw=1.2, ms=3)
        axes.set(xlabel="step", ylabel="loss (nats)" if name == "loss" else name)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
