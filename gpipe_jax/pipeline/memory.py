"""What a device holds during a training step, from shapes: the sum that a compiler should be near.

    parameters + optimizer + gradients + stash + working set + batch

The working set is that of the stage that has the largest: what its layers keep for their backward
pass, as the recomputation policy has it (see `remat`), and the gradients of one layer (or scanned
run) before they are added to the sums.
"""

from collections.abc import Sequence

import jax

from gpipe_jax.partition.costs import LayerCost
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
    optimizer_bytes: int,
    loss_bytes: int,
    batch_bytes: int,
) -> dict[str, int]:
    """Bytes by part. `loss_bytes` is the working set of the loss, `batch_bytes` one device's."""
    rows = lower(schedule)
    wire, back = (
        tree_bytes(stages.boundary_format.shapes),
        tree_bytes(stages.boundary_format.gradient_shapes),
    )
    statistics = sum(storage.device_bytes() for storage in stages.stats)
    working = [_working_set(stages, costs, s) for s in range(len(stages.geometry.layer_ranges))]
    working[-1] += loss_bytes
    return {
        # A tied parameter is copied to every device for the step, as is its gradient.
        "parameters": stages.params.device_bytes() + statistics + stages.ties.bytes(),
        "optimizer": optimizer_bytes,
        "gradients": float32_bytes(stages) + statistics + stages.ties.bytes(4),
        # What has arrived and what is sent is held beside the slots.
        "stash": (rows.x_slots + 2) * wire + (rows.g_slots + 2) * back,
        "working_set": max(working),
        "batch": batch_bytes,
    }


def float32_bytes(stages: Stages) -> int:
    """Bytes of a device's gradients, which are float32 at least."""
    leaves = jax.tree.leaves([storage.local_shapes() for storage in stages.params])
    return sum(a.size * max(a.dtype.itemsize, 4) for a in leaves)


def _working_set(stages: Stages, costs: Sequence[LayerCost], s: int) -> int:
    layers = stages.geometry.layer_ranges[s]
    own = [costs[i] for i in layers]
    inputs = [tree_bytes(stages.geometry.shapes[i].boundary) for i in layers]
    runs = [run for run in stages.geometry.runs[s] if run.scanned]
    scanned = [run.count * own[run.start].parameter_bytes for run in runs]
    return stages.remat.stage_bytes(own, inputs, scanned)


def check(parts: dict[str, int], limit: float) -> None:
    """Raise ValueError if the parts come to more than `limit` bytes."""
    need = sum(parts.values())
    if need > limit:
        raise ValueError(
            f"a device needs {format_bytes(need)} ({describe(parts)}), but `memory_limit` is "
            f"{format_bytes(limit)}; use more stages or micro-batches, or raise it"
        )


def describe(parts: dict[str, int]) -> str:
    """List the parts and their sizes in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in parts.items())
