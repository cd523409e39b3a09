"""Predict the time of a training step from the times of its stages.

All devices execute the schedule in lockstep. A tick takes as long as its slowest entry
(`schedules.simulation.simulate`). Here 2 devices, 2 micro-batches, GPipe's schedule; a forward
takes 1 s, a backward 3 s on device 0 and 4 s on device 1:

    tick        0     1        2         3         4          5
    device 0    F0    F1       .         .         B0         B1
    device 1    .     F0 (0 s) F1 (0 s)  B0        B1         .
    seconds     1     1        0         4         4          3      = 13 s

    step  =  these 13 s   =   compute      a device's work, without recompute    mean of devices
                            + recompute    forwards that are computed again      mean of devices
                            + imbalance    the busiest device over the mean
                            + bubble       waiting of the busiest device
          +  transfer of boundaries  +  reduction of gradients over replicas  +  optimizer's update

(The last stage has no forward of its own: it is part of its backward.)

Nothing here has been measured on a TPU. Cycles are the compiler's own estimates, over the clock at
which its estimate of a matrix product equals the published peak. Transfers are bytes over the
bandwidth of one link, without overlap, latency or congestion.
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
    """Hold the seconds that each stage takes for one micro-batch."""

    forward: list[float]  # zero for the last stage, whose forward is part of its backward
    backward: list[float]  # includes what it recomputes
    recompute: list[float]  # the share of `backward` that repeats earlier work


class StepTime(NamedTuple):
    """Hold the seconds of a training step by cause; the first four are the schedule's time."""

    compute: float  # work of a device, without repetition; mean over devices
    recompute: float  # repeated work of a device; mean over devices
    imbalance: float  # work of the busiest device minus the mean
    bubble: float  # waiting of the busiest device
    transfer: float
    gradient_reduction: float
    update: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return sum(self)


def stage_times(forward: Sequence[float], backward: Sequence[float], remat: Remat) -> StageTimes:
    """Return the times of each stage from those of its two programs.

    A backward computes each layer's forward `remat.forwards` times. All of them repeat work, except
    the first in the last stage, which has no forward of its own.
    """
    last = len(backward) - 1
    repeated = [time * remat.forwards for time in forward[:last]]
    repeated.append(forward[last] * (remat.forwards - 1))
    return StageTimes([*forward[:last], 0.0], list(backward), repeated)


def step_time(
    stages: Stages,
    schedule: Schedule,
    times: StageTimes,
    topology: Topology,
    *,
    replicas: int,
    update_s: float,
) -> StepTime:
    """Return the time of a training step.

    Args:
        stages: The stages and their place on the devices.
        schedule: Which device computes what in which tick.
        times: The seconds of each stage for one micro-batch.
        topology: The devices; their links have bandwidths.
        replicas: The number D of replicas.
        update_s: The seconds of the optimizer's update.
    """
    ticks = simulate(schedule, times.forward, times.backward).time
    num_devices = stages.geometry.num_devices

    def of_devices(stage_times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Sum the times of the stages on each device, for all micro-batches."""
        # Stage s is on device s % num_devices.
        summed = np.asarray(stage_times).reshape(-1, num_devices).sum(0)
        return summed * schedule.micro_batches

    busy = of_devices(np.add(times.forward, times.backward))
    repeated = of_devices(times.recompute)
    return StepTime(
        compute=float((busy - repeated).mean()),
        recompute=float(repeated.mean()),
        imbalance=float(busy.max() - busy.mean()),
        bubble=float(ticks - busy.max()),
        transfer=_transfer(stages, schedule, topology),
        gradient_reduction=_reduction(stages, replicas, topology),
        update=update_s,
    )


def _transfer(stages: Stages, schedule: Schedule, topology: Topology) -> float:
    """Return the time of sending: every tick of a segment sends, needed or not; see `executor`."""
    if stages.geometry.last == 0:
        return 0.0
    operation = schedule.table[..., 0]
    forwards = np.nonzero((operation == FORWARD).any(axis=1))[0]
    backwards = np.nonzero((operation == BACKWARD).any(axis=1))[0]
    boundary = stages.boundary_format
    sent_bytes = (int(forwards[-1]) + 1) * tree_bytes(boundary.shapes)
    sent_bytes += (schedule.ticks - int(backwards[0])) * tree_bytes(boundary.gradient_shapes)
    return float(sent_bytes / _speed_between_stages(topology))


def _reduction(stages: Stages, replicas: int, topology: Topology) -> float:
    """Return the time of sums: over replicas; of tied parameters and gradients, over stages."""
    tied = stages.ties.bytes() + stages.ties.bytes(4)
    return _all_reduce(
        replicas, float32_bytes(stages), topology.generation.link_bytes_s
    ) + _all_reduce(stages.geometry.num_devices, tied, _speed_between_stages(topology))


def _all_reduce(devices: int, size: int, bytes_s: float) -> float:
    """Return the time of an all-reduce in a ring, on one link."""
    return 2 * (devices - 1) / devices * size / bytes_s


def _speed_between_stages(topology: Topology) -> float:
    speed = topology.generation.link_bytes_s
    # All devices wait for the slowest link.
    return min(speed, topology.generation.dcn_bytes_s) if topology.slices > 1 else speed
