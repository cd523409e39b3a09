"""Pictures: a schedule, and the curves of a run. Needs matplotlib, imported when first used."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.utils.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {FORWARD: "#7fb3e6", BACKWARD: "#f2b36b"}


def schedule(plan: Schedule, path: Path | None = None) -> "Figure":
    """Draw a schedule: a row for each device, a box for each forward and backward.

    The later a chunk is in the network, the paler is its box. Written to `path` where given.
    """
    figure = new_figure(min(max(6.0, 0.32 * plan.ticks), 40.0), 0.42 * plan.num_devices + 1.3)
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    for t in range(plan.ticks):
        for k in range(plan.num_devices):
            op, m, chunk = plan.table[t, k].tolist()
            if op in COLOURS:
                face = (COLOURS[op], 1 - 0.6 * chunk / plan.chunks)
                box = Rectangle((t, k - 0.45), 1, 0.9, facecolor=face, edgecolor="white")
                axes.add_patch(box)
                if plan.ticks <= 120:
                    axes.text(t + 0.5, k, str(m), ha="center", va="center", fontsize=8)
    axes.set(
        xlim=(0, plan.ticks), ylim=(plan.num_devices - 0.4, -0.6), xlabel="tick", ylabel="device"
    )
    axes.set_yticks(range(plan.num_devices))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(
        f"{plan.kind}: {plan.num_devices} devices, {plan.micro_batches} micro-batches, "
        f"bubble {plan.bubble_fraction:.1%}",
        fontsize=10,
    )
    boxes = [Rectangle((0, 0), 1, 1, facecolor=c) for c in COLOURS.values()]
    figure.legend(boxes, ["forward", "backward"], loc="outside lower right", ncols=2, fontsize=8)
    return save_figure(figure, path)


def curves(records: Sequence[dict], path: Path) -> None:
    """Draw loss and accuracy over the steps, in training and on held-out data."""
    names = [n for n in ("loss", "accuracy") if any(n in r or f"test_{n}" in r for r in records)]
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
