"""How long a training step takes: the schedule run with the cycles that the compiler expects.

    step = ticks, each as long as its slowest entry (`schedule.simulate`)
         + transfers of boundaries + reduction of gradients over replicas + optimizer's update

Nothing here has been timed on a TPU. Cycles are the compiler's own estimates, over the clock at
which its estimate of a matrix product meets the published peak; transfers are bytes over one link's
bandwidth, not overlapped with anything, without latency or congestion.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpipe_jax.pipeline.memory import float32_bytes
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.remat import Remat
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule
from gpipe_jax.schedules.simulation import simulate
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.utils.trees import tree_bytes


class StageTimes(NamedTuple):
    """Seconds of each stage on one micro-batch."""

    forward: list[float]  # zero for the last stage, whose forward is part of its backward
    backward: list[float]  # with what it recomputes
    recompute: list[float]  # the part of `backward` that has been computed before


class StepTime(NamedTuple):
    """Seconds of one training step, by part; the first four add up to the schedule's time."""

    compute: float  # a device's own work, on average, each thing once
    recompute: float  # what it computes again, on average
    imbalance: float  # how much more the busiest device has to do than the average
    bubble: float  # the busiest device's waiting
    transfer: float
    gradient_reduction: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self)


def stage_times(forward: Sequence[float], backward: Sequence[float], remat: Remat) -> StageTimes:
    """From the times of each stage's two programs.

    A backward computes each layer's forward `remat.forwards` times. All of them repeat work, except
    the first in the last stage, which has no forward of its own.
    """
    last = len(backward) - 1
    again = [time * remat.forwards for time in forward[:last]]
    again.append(forward[last] * (remat.forwards - 1))
    return StageTimes([*forward[:last], 0.0], list(backward), again)


def step_time(
    stages: Stages,
    schedule: Schedule,
    times: StageTimes,
    topology: Topology,
    *,
    replicas: int,
    update_s: float,
) -> StepTime:
    """One training step, if its stages take so long."""
    ticks = simulate(schedule, times.forward, times.backward).time
    of_device = lambda each: np.asarray(each).reshape(-1, stages.geometry.num_devices).sum(0)  # noqa: E731
    busy = of_device(np.add(times.forward, times.backward)) * schedule.micro_batches
    again = of_device(times.recompute) * schedule.micro_batches
    return StepTime(
        compute=float((busy - again).mean()),
        recompute=float(again.mean()),
        imbalance=float(busy.max() - busy.mean()),
        bubble=float(ticks - busy.max()),
        transfer=_transfer(stages, schedule, topology),
        gradient_reduction=_reduction(stages, replicas, topology),
        update=update_s,
    )


def _transfer(stages: Stages, schedule: Schedule, topology: Topology) -> float:
    """Every tick of a segment sends, needed or not: see `executor`."""
    if stages.geometry.last == 0:
        return 0.0
    operation = schedule.table[..., 0]
    forwards = np.nonzero((operation == FORWARD).any(axis=1))[0]
    backwards = np.nonzero((operation == BACKWARD).any(axis=1))[0]
    wire = stages.boundary_format
    sent = (int(forwards[-1]) + 1) * tree_bytes(wire.shapes)
    sent += (schedule.ticks - int(backwards[0])) * tree_bytes(wire.gradient_shapes)
    return float(sent / _speed_between_stages(topology))


def _reduction(stages: Stages, replicas: int, topology: Topology) -> float:
    """Sums over the replicas; and over the stages of tied parameters, and of their gradients."""
    tied = stages.ties.bytes() + stages.ties.bytes(4)
    return _all_reduce(
        replicas, float32_bytes(stages), topology.generation.link_bytes_s
    ) + _all_reduce(stages.geometry.num_devices, tied, _speed_between_stages(topology))


def _all_reduce(devices: int, size: int, bytes_s: float) -> float:
    """In a ring, on one link."""
    return 2 * (devices - 1) / devices * size / bytes_s


def _speed_between_stages(topology: Topology) -> float:
    speed = topology.generation.link_bytes_s
    # All wait for the slowest link.
    return min(speed, topology.generation.dcn_bytes_s) if topology.slices > 1 else speed
