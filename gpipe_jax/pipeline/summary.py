"""Summarize a pipeline as a table of its stages and a list of facts."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.partition.solver import Partition
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.schedules.buffers import lower
from gpipe_jax.schedules.schedule import Schedule
from gpipe_jax.schedules.simulation import simulate
from gpipe_jax.utils import text
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes

STAGE_HEADER = ("stage", "layers", "first layer", "cost", "parameters")


class Summary(NamedTuple):
    """Hold a table, and facts to print below it."""

    rows: list[tuple[str, ...]]  # the header first
    facts: dict[str, str]  # by name

    def __str__(self) -> str:
        facts = (f"{name}: {fact}" for name, fact in self.facts.items())
        return "\n".join([text.text_table(self.rows), *facts])

    def _repr_html_(self) -> str:
        return text.html_table(self.rows, self.facts)


def summarize(
    stages: Stages,
    partition: Partition,
    schedule: Schedule,
    *,
    cost_kind: str,
    replicas: int,
    batch_size: int,
) -> Summary:
    """Return the stages and their balance, the schedule and its bubble, stash and padding."""
    geometry = stages.geometry
    total = sum(partition.costs) or 1.0
    rows: list[tuple[str, ...]] = [(*STAGE_HEADER, "output")]
    for s, layers in enumerate(geometry.layer_ranges):
        shapes = [geometry.shapes[i] for i in layers]
        row = stage_row(
            s,
            (layers[0], layers[-1]),
            str(shapes[0].layer),
            partition.costs[s] / total,
            elements(shapes),
        )
        rows.append((*row, format_bytes(tree_bytes(shapes[-1].output))))
    lower_bound = partition.bound / partition.bottleneck if partition.bottleneck else 1
    waiting = _lockstep_bubble(schedule, partition.costs)
    facts = {
        "mesh": _mesh(stages, replicas),
        "batch": f"{batch_size} examples in {schedule.micro_batches} micro-batches of "
        f"{batch_size // schedule.micro_batches // replicas} on each replica",
        "balance": f"slowest stage {partition.imbalance:.3f} of the mean; "
        f"lower bound {lower_bound:.3f} of the slowest",
        "costs": cost_kind,
        "schedule": f"{schedule.kind}, {schedule.ticks} ticks, "
        f"bubble {schedule.bubble_fraction:.1%} of the slots, "
        f"{waiting:.1%} of the time if ticks wait for the slowest",
        "stash": _stash(stages, schedule),
        "parameters": f"{_count(stages)}, {_parameters(stages)}",
        "boundaries": "packed to the largest"
        if stages.boundary_format.packed
        else "all equal, not packed",
    }
    return Summary(rows, facts)


def stage_row(
    s: int, layers: tuple[int, int], first_layer: str, cost_fraction: float, parameters: int
) -> tuple[str, ...]:
    """Return the cells of stage s below `STAGE_HEADER`; `layers` are its first and last."""
    first, last = layers
    indices = f"{first}-{last}" if last > first else f"{first}"
    return (str(s), indices, first_layer, f"{cost_fraction:.1%}", f"{parameters:,}")


def _mesh(stages: Stages, replicas: int) -> str:
    geometry = stages.geometry
    mesh = f"{geometry.num_devices} devices x {replicas} replicas"
    if geometry.chunks > 1:
        mesh += f", {geometry.chunks} stages on each device"
    return mesh


def _stash(stages: Stages, schedule: Schedule) -> str:
    slots = lower(schedule).x_slots
    size = format_bytes(slots * tree_bytes(stages.boundary_format.shapes))
    return f"{slots} boundary inputs, {size} on each device"


def _count(stages: Stages) -> str:
    """Return the number of parameters, and how many of them are frozen."""
    shapes = stages.geometry.shapes
    frozen = sum(a.size for shape in shapes for a in jax.tree.leaves(shape.fixed.params))
    return f"{elements(shapes):,}" + (f" ({frozen:,} frozen)" if frozen else "")


def _parameters(stages: Stages) -> str:
    K = stages.geometry.num_devices
    device = stages.params.device_bytes() + stages.fixed.device_bytes()
    own = sum(stages.geometry.parameter_bytes(k) for k in range(K))
    padding = 1 - own / (device * K or 1)
    return f"{format_bytes(device)} on each device, {padding:.1%} of it padding"


def _lockstep_bubble(schedule: Schedule, costs: Sequence[float]) -> float:
    """Return the bubble if every tick takes as long as its slowest entry.

    A forward takes a third of the time of a (recomputing) backward, that of the last stage none.
    """
    forward = [*(cost / 3 for cost in costs[:-1]), 0.0]
    return simulate(schedule, forward, costs).bubble_fraction
