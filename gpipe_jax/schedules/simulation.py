"""Simulate a schedule: compute its duration and its bubble."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, Schedule, ticks_of


class Simulation(NamedTuple):
    """Hold the duration of a schedule, in the unit of the given times, and its bubble."""

    time: float  # until the last operation ends
    bubble_fraction: float  # 1 - useful time / (K x time)


def simulate(
    schedule: Schedule,
    forward: Sequence[float],
    backward: Sequence[float],
    *,
    lockstep: bool = True,
) -> Simulation:
    """Compute how long a schedule takes, from the times of its stages.

    Args:
        schedule: The schedule, of K V stages.
        forward: The time of each stage's forward, [K V], in any unit.
        backward: The time of each stage's backward, [K V], in the same unit.
        lockstep: If True, a tick lasts as long as its slowest operation, as in one SPMD program
            whose devices exchange boundaries at each tick. If False, an operation starts as soon as
            its device is free and its input has arrived. Default: True.

    Returns:
        The total time, and the share of it in which devices wait.

    Raises:
        ValueError: The number of times is not the number of stages.

    Example:
        >>> from gpipe_jax.schedules import gpipe
        >>> simulate(gpipe(2, 4), forward=[1, 1], backward=[3, 3]).time
        20.0
    """
    cost = entry_times(schedule, forward, backward)
    time = float(cost.max(axis=1).sum()) if lockstep else _dependent_time(schedule, cost)
    bubble = 1 - cost.sum() / (schedule.num_devices * time) if time else 0.0
    return Simulation(time, float(bubble))


class UsualTimes(NamedTuple):
    """Hold times of stages without a measurement: [K V] each, in the time of a device's forward."""

    forward: list[float]
    backward: list[float]


def usual_times(schedule: Schedule) -> UsualTimes:
    """Return the times of equal stages: through all chunks of a device, a forward takes 1.

    A backward recomputes the forward and takes 3. The last stage's forward is part of its backward,
    and takes no time of its own.

    Example:
        >>> from gpipe_jax.schedules import gpipe
        >>> usual_times(gpipe(2, 4))
        UsualTimes(forward=[1.0, 0.0], backward=[3.0, 3.0])
    """
    forward = [1 / schedule.chunks] * (schedule.num_devices * schedule.chunks)
    if not (schedule.table[..., 0] == BACKWARD).any():
        return UsualTimes(forward, [0.0 for _ in forward])
    return UsualTimes([*forward[:-1], 0.0], [3 * time for time in forward])


def entry_times(
    schedule: Schedule, forward: Sequence[float], backward: Sequence[float]
) -> np.ndarray:
    """Return the time of each entry of the table, [T, K], from the times of the stages, [K V]."""
    stages = schedule.table[..., 2] * schedule.num_devices + np.arange(schedule.num_devices)
    count = schedule.num_devices * schedule.chunks
    cost = np.zeros(schedule.table.shape[:2])
    for op, times in ((FORWARD, forward), (BACKWARD, backward)):
        if len(times) != count:
            raise ValueError(
                f"got {len(times)} times of stages for a schedule of {count} stages; give {count}"
            )
        cost += np.where(schedule.table[..., 0] == op, np.asarray(times, float)[stages], 0.0)
    return cost


def _dependent_time(schedule: Schedule, cost: np.ndarray) -> float:
    """Return the time if each operation waits for its device and its input only."""
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
