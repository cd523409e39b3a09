"""A pipeline as a table: stages, costs, balance, bubble, stash, padding."""

from typing import TYPE_CHECKING

from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.schedules.buffers import lower
from gpipe_jax.schedules.simulation import simulate
from gpipe_jax.utils import text
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes

if TYPE_CHECKING:
    from gpipe_jax.pipeline.pipeline import Pipeline

HEADER = ("stage", "layers", "first layer", "cost", "parameters", "output")


def as_text(pipe: "Pipeline") -> str:
    """The table in plain text, with the facts of the whole pipeline below it."""
    found = (f"{name}: {value}" for name, value in facts(pipe).items())
    return "\n".join([text.text_table([HEADER, *_rows(pipe)]), *found])


def as_html(pipe: "Pipeline") -> str:
    """The same for a notebook."""
    return text.html_table([HEADER, *_rows(pipe)], facts(pipe))


def _rows(pipe: "Pipeline") -> list[tuple[str, ...]]:
    total = sum(pipe.partition.costs) or 1.0
    rows = []
    for k, cut in enumerate(pipe.stages.geometry.layer_ranges):
        output = tree_bytes(pipe.shapes[cut[-1]].output)
        rows.append(
            (
                str(k),
                f"{cut[0]}-{cut[-1]}" if len(cut) > 1 else f"{cut[0]}",
                str(pipe.layers[cut[0]]),
                f"{pipe.partition.costs[k] / total:.1%}",
                f"{elements(pipe.shapes[i] for i in cut):,}",
                format_bytes(output),
            )
        )
    return rows


def facts(pipe: "Pipeline") -> dict[str, str]:
    """The figures of the whole pipeline, by name."""
    schedule, stages = pipe.schedule, pipe.stages
    own = [stages.geometry.parameter_bytes(k) for k in range(stages.geometry.num_devices)]
    device = stages.params.device_bytes()
    wire = sum(a.size * a.dtype.itemsize for a in stages.boundary_format.shapes)
    rows = lower(schedule)
    cut = pipe.partition
    return {
        "mesh": f"{stages.geometry.num_devices} devices x {pipe.replicas} replicas"
        + (
            f", {stages.geometry.chunks} stages on each device"
            if stages.geometry.chunks > 1
            else ""
        ),
        "batch": f"{pipe.batch_size} examples in {pipe.micro_batches} micro-batches of "
        f"{pipe.batch_size // pipe.micro_batches // pipe.replicas} on each replica",
        "balance": f"slowest stage {cut.imbalance:.3f} of the mean; "
        f"lower bound {cut.bound / cut.bottleneck if cut.bottleneck else 1:.3f} of the slowest",
        "schedule": f"{schedule.kind}, {schedule.ticks} ticks, "
        f"bubble {schedule.bubble_fraction:.1%} of the slots, "
        f"{_lockstep_bubble(pipe):.1%} of the time if ticks wait for the slowest",
        "stash": f"{rows.x_slots} boundary inputs, "
        f"{format_bytes(rows.x_slots * wire)} on each device",
        "parameters": f"{elements(pipe.shapes):,}, "
        f"{format_bytes(device)} on each device, "
        f"{1 - sum(own) / (device * len(own) or 1):.1%} of it padding",
        "boundaries": "packed to the largest"
        if stages.boundary_format.packed
        else "all alike, as they are",
    }


def _lockstep_bubble(pipe: "Pipeline") -> float:
    """Bubble with a forward at a third of a (recomputing) backward's time, the last one at none."""
    backward = pipe.partition.costs
    forward = [*(cost / 3 for cost in backward[:-1]), 0.0]
    return simulate(pipe.schedule, forward, backward).bubble_fraction
