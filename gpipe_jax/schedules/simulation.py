"""Simulate a schedule: how long it takes and how much of it is bubble."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule, ticks_of


class Simulation(NamedTuple):
    """What a schedule costs, in the unit of the given times."""

    time: float  # until the last operation ends
    bubble_fraction: float  # 1 - useful time over K x time


def simulate(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    lockstep: bool = True,
) -> Simulation:
    """Run the table with `forward[s]` and `backward[s]` as the time of stage s's operations.

    With `lockstep` a tick lasts as long as its slowest operation, as in one SPMD program whose
    devices exchange boundaries at every tick; without, an operation starts as soon as its device is
    free and its input has arrived.
    """
    stages = schedule.table[..., 2] * schedule.num_devices + np.arange(schedule.num_devices)
    count = schedule.num_devices * schedule.chunks
    cost = np.zeros(schedule.table.shape[:2])
    for op, times in ((FORWARD, forward), (BACKWARD, backward)):
        if len(times) != count:
            raise ValueError(f"{len(times)} stage times for a schedule of {count} stages")
        cost += np.where(schedule.table[..., 0] == op, np.asarray(times, float)[stages], 0.0)
    time = float(cost.max(axis=1).sum()) if lockstep else _dependent_time(schedule, cost)
    bubble = 1 - cost.sum() / (schedule.num_devices * time) if time else 0.0
    return Simulation(time, float(bubble))


def _dependent_time(schedule: Schedule, cost: np.ndarray) -> float:
    forward, backward = ticks_of(schedule.table)
    K, end, free = schedule.num_devices, {}, [0.0] * schedule.num_devices
    last = K * schedule.chunks - 1
    order = sorted(
        [(t, FORWARD, s, m) for (s, m), t in forward.items()]
        + [(t, BACKWARD, s, m) for (s, m), t in backward.items()]
    )
    for t, op, s, m in order:
        source = (FORWARD, s - 1, m) if op == FORWARD else (BACKWARD, s + 1, m)
        if op == BACKWARD and s == last:
            source = (FORWARD, s, m)
        free[s % K] = max(free[s % K], end.get(source, 0.0)) + cost[t, s % K]
        end[op, s, m] = free[s % K]
    return float(max(free))
