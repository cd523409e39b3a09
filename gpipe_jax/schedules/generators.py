"""Generate schedules: GPipe, 1F1B, eager 1F1B, interleaved, and forward-only for evaluation.

To add a training schedule, write its function and add it to `TRAINING` (and to `CHUNKED`, if it
takes several chunks). The configuration, the planner and the command line read these names.

Letters: K devices, V chunks, M micro-batches, t tick, k device, s stage, m micro-batch.
"""

from collections.abc import Collection, Sequence

import numpy as np

from gpipe_jax.errors import ArgumentError
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, IDLE, Schedule
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean_or_list


def gpipe(num_devices: int, micro_batches: int) -> Schedule:
    """Return GPipe's schedule: all forwards, then all backwards.

    Source: Huang et al., GPipe, https://arxiv.org/abs/1811.06965, section 2.2.

    Args:
        num_devices: K, at least 1.
        micro_batches: M, at least 1.

    Returns:
        A schedule of 2 (M + K - 1) ticks, in which each device stashes M inputs.

    Raises:
        ValueError: An argument is less than 1.

    Example:
        >>> print(gpipe(2, 3))
        tick       0  1  2  3  4  5  6  7
        device 0  F0 F1 F2  .  . B0 B1 B2
        device 1   . F0 F1 F2 B0 B1 B2  .
    """
    K, M = _checked(num_devices, micro_batches)
    ops = [(k + m, k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(M + K - 1 + (K - 1 - k) + m, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("gpipe", _table(K, ops))


def one_f_one_b(num_devices: int, micro_batches: int) -> Schedule:
    """Return the 1F1B schedule: one forward and one backward in turn.

    Each device runs a backward if one is ready. Else it runs the next forward, if fewer than K - k
    micro-batches wait for their backward on it.

    Source: PipeDream-flush, Narayanan et al. 2020, https://arxiv.org/abs/2006.09503, section 3.2.

    Args:
        num_devices: K, at least 1.
        micro_batches: M, at least 1.

    Returns:
        A schedule in which device k stashes at most K - k inputs.

    Raises:
        ValueError: An argument is less than 1.

    Example:
        >>> print(one_f_one_b(2, 3))
        tick       0  1  2  3  4  5  6  7
        device 0  F0 F1  . B0 F2 B1  . B2
        device 1   . F0 B0 F1 B1 F2 B2  .
    """
    K, M = _checked(num_devices, micro_batches)
    forward, backward = [0] * K, [0] * K  # how many each device has done
    ops, t = [], 0
    while min(backward) < M:
        row = [_next_operation(k, K, M, forward, backward) for k in range(K)]
        for k, op in enumerate(row):
            if op != IDLE:
                done = forward if op == FORWARD else backward
                ops.append((t, k, op, done[k]))
                done[k] += 1
        t += 1
    return Schedule("1f1b", _table(K, ops))


def _next_operation(k: int, K: int, M: int, forward: list[int], backward: list[int]) -> int:
    """Return what device k does next in 1F1B, from how many of each all devices have done.

    K = 3, M = 4. At tick 5 the devices have done forward = [3, 2, 2] and backward = [0, 1, 1]:

        tick       0  1  2  3  4  5
        device 0  F0 F1 F2  .  . B0      m = 0: forward done, and stage 1 has done its backward
        device 1   . F0 F1  . B0 F2      m = 1: stage 2 has not; 2 - 1 < K - 1, so forward 2
        device 2   .  . F0 B0 F1 B1      m = 1: the last stage needs its own forward only

    At ticks 3 and 4 device 0 is idle: K micro-batches wait for their backward on it.
    """
    m = backward[k]
    if m < forward[k] and (k == K - 1 or m < backward[k + 1]):
        return BACKWARD
    m = forward[k]
    if m < M and m - backward[k] < K - k and (k == 0 or m < forward[k - 1]):
        return FORWARD
    return IDLE


def eager_1f1b(num_devices: int, micro_batches: int) -> Schedule:
    """Return 1F1B with all devices forward in one tick and backward in the next.

    In one SPMD program a tick lasts as long as its slowest operation, and a backward takes three
    times as long as a forward. Plain 1F1B has some device in a backward at every tick of its steady
    state, so a micro-batch takes two backward times. Here it takes one forward and one backward, as
    in GPipe. The price is a larger stash. Compare both with `simulate`.

    Args:
        num_devices: K, at least 1.
        micro_batches: M, at least 1.

    Returns:
        A schedule in which device k stashes at most 2 (K - k) - 1 inputs.

    Raises:
        ValueError: An argument is less than 1.

    Example:
        >>> print(eager_1f1b(2, 3))
        tick       0  1  2  3  4  5  6  7
        device 0  F0 F1  . F2 B0  . B1 B2
        device 1   . F0 B0 F1 B1 F2 B2  .
    """
    K, M = _checked(num_devices, micro_batches)
    ops = [(2 * (m + k), k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(2 * (m + 2 * (K - 1) - k) + 1, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("eager_1f1b", _table(K, ops))


def interleaved(num_devices: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """Return `eager_1f1b` with V chunks on each device, which divides the bubble by V.

    A group of K micro-batches goes through all chunks before the next group starts. If K does not
    divide M, groups are larger. Forwards of all devices share ticks, and so do backwards.

    Source: Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2.

    Args:
        num_devices: K, at least 1.
        micro_batches: M, at least 1.
        chunks: V, the number of stages on each device, at least 1. Default: 2.

    Returns:
        A schedule for K V stages; chunk c of device k is stage c K + k.

    Raises:
        ValueError: An argument is less than 1.

    Example:
        >>> interleaved(4, 8, chunks=2).bubble_fraction < eager_1f1b(4, 8).bubble_fraction
        True
    """
    K, M = _checked(num_devices, micro_batches)
    chunks = check_count("chunks", chunks)
    forwards = _ring_order(K, M, range(chunks))
    backwards = _ring_order(K, M, range(chunks)[::-1])
    # The last stage runs the forward of a micro-batch before its backward.
    late = max(forwards[chunks - 1, m] - backwards[chunks - 1, m] for m in range(M)) + K - 1
    ops = []
    for (c, m), turn in forwards.items():
        ops += [(2 * (turn + k), k, FORWARD, m, c) for k in range(K)]
    for (c, m), turn in backwards.items():
        ops += [(2 * (turn + late + K - 1 - k) + 1, k, BACKWARD, m, c) for k in range(K)]
    return Schedule("interleaved", _table(K, ops))


def _ring_order(K: int, M: int, chunks: Sequence[int]) -> dict[tuple[int, int], int]:
    """Return (chunk, micro-batch) -> the turn in which the ring's first device runs it.

    A micro-batch returns to the first device after K turns. So a group of at least K micro-batches
    keeps that device busy, and a smaller group waits for its own return.
    """
    turns, start = {}, 0
    for group in np.array_split(np.arange(M), max(M // K, 1)):
        width = max(len(group), K)
        for i, c in enumerate(chunks):
            turns.update({(c, int(m)): start + i * width + j for j, m in enumerate(group)})
        start += (len(chunks) - 1) * width + len(group)
    return turns


def forward_only(num_devices: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Return the forward half of GPipe, or of `interleaved`, for evaluation.

    Args:
        num_devices: K, at least 1.
        micro_batches: M, at least 1.
        chunks: V, the number of stages on each device, at least 1. Default: 1.

    Returns:
        A schedule without backwards.

    Raises:
        ValueError: An argument is less than 1.

    Example:
        >>> print(forward_only(2, 3))
        tick       0  1  2  3
        device 0  F0 F1 F2  .
        device 1   . F0 F1 F2
    """
    K, M = _checked(num_devices, micro_batches)
    chunks = check_count("chunks", chunks)
    turns = _ring_order(K, M, range(chunks))
    ops = [(turn + k, k, FORWARD, m, c) for (c, m), turn in turns.items() for k in range(K)]
    return Schedule("forward", _table(K, ops))


TRAINING = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_1f1b,
    "interleaved": interleaved,
}


KINDS = {**TRAINING, "forward": forward_only}

CHUNKED = ("interleaved", "forward")  # the kinds that take several chunks for each device
CHUNKED_TRAINING = tuple(kind for kind in TRAINING if kind in CHUNKED)


def make(kind: str, num_devices: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Return the schedule of this name.

    Args:
        kind: "gpipe", "1f1b", "eager_1f1b", "interleaved" or "forward".
        num_devices: K, at least 1.
        micro_batches: M, at least 1.
        chunks: V, the number of stages on each device. Default: 1; only "interleaved" and "forward"
            take more.

    Returns:
        The schedule.

    Raises:
        ValueError: The name is unknown, a number is less than 1, or the schedule takes one chunk.

    Example:
        >>> make("1f1b", 4, 8).peak_stash
        [4, 3, 2, 1]
    """
    _check_name("kind", kind, KINDS)
    if kind in CHUNKED:
        return KINDS[kind](num_devices, micro_batches, chunks)
    if chunks != 1:
        raise ArgumentError(
            "chunks",
            f"the schedule {kind!r} has one chunk on each device, got `chunks` {chunks}; "
            f"use {' or '.join(map(repr, CHUNKED_TRAINING))}",
        )
    return KINDS[kind](num_devices, micro_batches)


def training_schedule(
    schedule: "str | Schedule", num_devices: int, micro_batches: int, chunks: int = 1
) -> Schedule:
    """Return a schedule that trains a pipeline of this size.

    Args:
        schedule: The name of a training schedule, or a table of your own to check.
        num_devices: K, the devices in the pipeline.
        micro_batches: M, the micro-batches of a step.
        chunks: V, the number of stages on each device. Default: 1. A table of your own has its own
            number.

    Returns:
        The schedule of that name, or `schedule` itself.

    Raises:
        ValueError: The name is unknown, or the table has no backwards or another size.

    Example:
        >>> training_schedule("gpipe", 2, 4).ticks
        10
    """
    if isinstance(schedule, str):
        _check_name("schedule", schedule, TRAINING)
        return make(schedule, num_devices, micro_batches, chunks)
    if not (schedule.table[..., 0] == BACKWARD).any():
        raise ArgumentError(
            "schedule", f"the schedule {schedule.kind!r} has no backwards; give one that trains"
        )
    sizes = (schedule.num_devices, schedule.micro_batches)
    if sizes != (num_devices, micro_batches):
        raise ArgumentError(
            "schedule",
            f"the schedule is for {sizes[0]} devices and {sizes[1]} micro-batches, but the "
            f"pipeline has {num_devices} and {micro_batches}; make a table of that size",
        )
    if chunks not in (1, schedule.chunks):
        raise ArgumentError(
            "chunks",
            f"the schedule has {schedule.chunks} chunks on each device, got `chunks` {chunks}; "
            f"leave `chunks` out for a table of your own",
        )
    return schedule


def _check_name(argument: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        known = did_you_mean_or_list(name, names)
        raise ArgumentError(argument, f"unknown schedule {name!r}{known}")


def _checked(num_devices: int, micro_batches: int) -> tuple[int, int]:
    return check_count("num_devices", num_devices), check_count("micro_batches", micro_batches)


def _table(K: int, ops: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the table of (tick, device, operation, micro-batch[, chunk]), without idle ticks."""
    table = np.zeros((max(t for t, *_ in ops) + 1, K, 3), np.int32)
    for t, k, *entry in ops:
        table[t, k, : len(entry)] = entry
    return table[(table[..., 0] != IDLE).any(axis=1)]
