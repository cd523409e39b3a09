"""Estimate what a device holds during a training step, from shapes.

    parameters + optimizer + gradients + stash + working set + batch

The estimate should be near what a compiler reports. The working set is that of the stage with the
largest one: what its layers store for their backward pass, as the recomputation policy says (see
`remat`), and the gradients of one layer or scanned run before they are added to the sums.
"""

from collections.abc import Callable, Sequence

import jax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.partition.costs import LayerCost, loss_bytes
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.schedules.buffers import lower
from gpipe_jax.schedules.schedule import Schedule
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes


def of_device(
    stages: Stages,
    costs: Sequence[LayerCost],
    schedule: Schedule,
    *,
    loss: Callable,
    micro_batch: dict,
    optimizer_bytes: int,
) -> dict[str, int]:
    """Return the bytes that each device holds, by part.

    Args:
        stages: The stages of the network.
        costs: The cost of each layer.
        schedule: Who does what when.
        loss: The loss of one micro-batch.
        micro_batch: The shapes of a micro-batch on one replica, labels and weights included.
        optimizer_bytes: What the optimizer's state takes on one device.
    """
    buffers = lower(schedule)
    boundary = tree_bytes(stages.boundary_format.shapes)
    gradient = tree_bytes(stages.boundary_format.gradient_shapes)
    statistics = stages.stats.device_bytes()
    stored = stages.params.device_bytes() + stages.fixed.device_bytes() + statistics
    working = [_working_set(stages, costs, s) for s in range(stages.geometry.num_stages)]
    output = stages.geometry.shapes[-1].output
    working[-1] += loss_bytes(loss, output, micro_batch["labels"], micro_batch["weights"])
    return {
        # Every device has a copy of each tied parameter during the step, and of its gradient.
        "parameters": stored + stages.ties.bytes() + stages.frozen_ties.bytes(),
        "optimizer": optimizer_bytes,
        "gradients": float32_bytes(stages) + statistics + stages.ties.bytes(4),
        # The received and the sent array exist beside the slots.
        "stash": (buffers.x_slots + 2) * boundary + (buffers.g_slots + 2) * gradient,
        "working_set": max(working),
        "batch": schedule.micro_batches * tree_bytes(micro_batch),
    }


def float32_bytes(stages: Stages) -> int:
    """Return the bytes of one device's gradients, which are at least float32."""
    leaves = jax.tree.leaves(stages.params.local_shapes())
    return sum(a.size * max(a.dtype.itemsize, 4) for a in leaves)


def _working_set(stages: Stages, costs: Sequence[LayerCost], s: int) -> int:
    """Return the bytes of stage s's backward pass beside the sums of gradients."""
    geometry = stages.geometry
    layers = geometry.layer_ranges[s]
    own = [costs[i] for i in layers]
    inputs = [tree_bytes(geometry.shapes[i].boundary) for i in layers]
    runs = [run for run in geometry.runs[s] if run.scanned]
    scanned = [run.count * own[run.start].parameter_bytes for run in runs]
    return stages.remat.stage_bytes(own, inputs, scanned)


def check(bytes_of: dict[str, int], limit: float) -> None:
    """Raise ValueError if they need, together, more than `limit` bytes."""
    need = sum(bytes_of.values())
    if need > limit:
        raise ArgumentError(
            "memory_limit",
            f"a device needs {format_bytes(need)} ({describe(bytes_of)}), but `memory_limit` is "
            f"{format_bytes(limit)}; use more stages or micro-batches, or raise it",
        )


def describe(bytes_of: dict[str, int]) -> str:
    """List what memory is used for, with sizes, in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in bytes_of.items())
