"""Make schedules: GPipe, 1F1B, eager 1F1B, interleaved, and forward-only for evaluation."""

from collections.abc import Sequence

import numpy as np

from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, IDLE, Schedule


def gpipe(num_devices: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, section 2.2). Stashes M micro-batches."""
    K, M = _checked(num_devices, micro_batches)
    ops = [(k + m, k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(M + K - 1 + (K - 1 - k) + m, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("gpipe", _table(K, ops))


def one_f_one_b(num_devices: int, micro_batches: int) -> Schedule:
    """One forward, one backward in turn (PipeDream-flush). Stage k stashes at most K - k.

    Each device does the backward that is ready, else the next forward as long as fewer than K - k
    micro-batches are under way on it.
    """
    K, M = _checked(num_devices, micro_batches)
    forward, backward = [0] * K, [0] * K  # how many each stage has done
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
    m = backward[k]
    if m < forward[k] and (k == K - 1 or m < backward[k + 1]):
        return BACKWARD
    m = forward[k]
    if m < M and m - backward[k] < K - k and (k == 0 or m < forward[k - 1]):
        return FORWARD
    return IDLE


def eager_1f1b(num_devices: int, micro_batches: int) -> Schedule:
    """1F1B in which all devices go forward in one tick and backward in the next.

    In one SPMD program a tick lasts as long as its slowest operation. Plain 1F1B always has some
    device in a (three times longer) backward, so its steady state takes two backward times for each
    micro-batch; here it takes a forward and a backward, as in GPipe. The price is a stash of
    2(K - k) - 1 instead of K - k. `simulate` shows both.
    """
    K, M = _checked(num_devices, micro_batches)
    ops = [(2 * (m + k), k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(2 * (m + 2 * (K - 1) - k) + 1, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("eager_1f1b", _table(K, ops))


def interleaved(num_devices: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """`eager_1f1b` with V chunks a device, for a V-th of the bubble (Narayanan et al. 2021, 2.2).

    A group of K micro-batches, or a few more so that M need not divide by K, goes through all
    chunks before the next group starts. Forwards of all devices share ticks, and so do backwards.
    """
    K, M = _checked(num_devices, micro_batches)
    forwards = _ring_order(K, M, range(_at_least_one(chunks)))
    backwards = _ring_order(K, M, range(chunks)[::-1])
    # The last stage must have gone forward on a micro-batch before it goes backward.
    late = max(forwards[chunks - 1, m] - backwards[chunks - 1, m] for m in range(M)) + K - 1
    ops = []
    for (c, m), turn in forwards.items():
        ops += [(2 * (turn + k), k, FORWARD, m, c) for k in range(K)]
    for (c, m), turn in backwards.items():
        ops += [(2 * (turn + late + K - 1 - k) + 1, k, BACKWARD, m, c) for k in range(K)]
    return Schedule("interleaved", _table(K, ops))


def _ring_order(K: int, M: int, chunks: Sequence[int]) -> dict[tuple[int, int], int]:
    """(chunk, micro-batch) -> the turn in which the ring's first device does it.

    What leaves the first device in a turn is back K turns later, so a group of at least K
    micro-batches keeps it busy; a smaller one waits for its own return.
    """
    turns, start = {}, 0
    for group in np.array_split(np.arange(M), max(M // K, 1)):
        width = max(len(group), K)
        for i, c in enumerate(chunks):
            turns.update({(c, int(m)): start + i * width + j for j, m in enumerate(group)})
        start += (len(chunks) - 1) * width + len(group)
    return turns


def forward_only(num_devices: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The forward half of GPipe, or of `interleaved`, for evaluation."""
    K, M = _checked(num_devices, micro_batches)
    turns = _ring_order(K, M, range(_at_least_one(chunks)))
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
    """The schedule of that name."""
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(KINDS)}")
    if kind in CHUNKED:
        return KINDS[kind](num_devices, micro_batches, chunks)
    if chunks != 1:
        raise ValueError(
            f"the schedule {kind!r} has one chunk on each device, got `chunks` {chunks}; "
            f"use 'interleaved'"
        )
    return KINDS[kind](num_devices, micro_batches)


def training_schedule(
    wanted: "str | Schedule", num_devices: int, micro_batches: int, chunks: int = 1
) -> Schedule:
    """`wanted`, or the schedule of that name; ValueError unless it trains that pipeline."""
    if isinstance(wanted, str):
        if wanted not in TRAINING:
            raise ValueError(f"unknown schedule {wanted!r} for training: {', '.join(TRAINING)}")
        return make(wanted, num_devices, micro_batches, chunks)
    if not (wanted.table[..., 0] == BACKWARD).any():
        raise ValueError(f"the schedule {wanted.kind!r} has no backwards; it cannot train")
    sizes = (wanted.num_devices, wanted.micro_batches)
    if sizes != (num_devices, micro_batches):
        raise ValueError(
            f"the schedule is for {sizes[0]} stages and {sizes[1]} micro-batches, the pipeline has "
            f"{num_devices} and {micro_batches}"
        )
    if chunks not in (1, wanted.chunks):
        raise ValueError(
            f"the schedule has {wanted.chunks} chunks on each device, got `chunks` {chunks}; "
            f"leave `chunks` out, as your own table says it"
        )
    return wanted


def _checked(num_devices: int, micro_batches: int) -> tuple[int, int]:
    for name, value in (("stages", num_devices), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    return num_devices, micro_batches


def _at_least_one(chunks: int) -> int:
    if chunks < 1:
        raise ValueError(f"`chunks` must be at least 1, got {chunks}")
    return chunks


def _table(K: int, ops: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The table of (tick, device, operation, micro-batch[, chunk]), without its all-idle ticks."""
    table = np.zeros((max(t for t, *_ in ops) + 1, K, 3), np.int32)
    for t, k, *entry in ops:
        table[t, k, : len(entry)] = entry
    return table[(table[..., 0] != IDLE).any(axis=1)]
