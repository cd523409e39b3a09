"""Draw a schedule, or the curves of a run, with matplotlib.

Public: `schedule`, `curves`. Both import matplotlib when they are called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.utils.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {FORWARD: "#7fb3e6", BACKWARD: "#f2b36b"}


def schedule(schedule: Schedule, path: Path | None = None) -> "Figure":
    """Draw a schedule: a row for each device, a box for each forward and backward.

    With several chunks on a device, boxes of later chunks are paler.

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
    K, ticks = schedule.num_devices, schedule.ticks
    figure = new_figure(min(max(6.0, 0.32 * ticks), 40.0), 0.42 * K + 1.3)
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    for t in range(ticks):
        for k in range(K):
            op, m, chunk = schedule.table[t, k].tolist()
            if op in COLOURS:
                face = (COLOURS[op], 1 - 0.6 * chunk / schedule.chunks)
                box = Rectangle((t, k - 0.45), 1, 0.9, facecolor=face, edgecolor="white")
                axes.add_patch(box)
                if ticks <= 120:
                    axes.text(t + 0.5, k, str(m), ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, ticks), ylim=(K - 0.4, -0.6), xlabel="tick", ylabel="device")
    axes.set_yticks(range(K))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(
        f"{schedule.kind}: {K} devices, {schedule.micro_batches} micro-batches, "
        f"bubble {schedule.bubble_fraction:.1%}",
        fontsize=10,
    )
    boxes = [Rectangle((0, 0), 1, 1, facecolor=c) for c in COLOURS.values()]
    figure.legend(boxes, ["forward", "backward"], loc="outside lower right", ncols=2, fontsize=8)
    return save_figure(figure, path)


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
