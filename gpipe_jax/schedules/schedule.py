"""Schedules as data: who does what, when. Pure numpy, no JAX.

A schedule is a table [T, K, 3] of (operation, micro-batch, chunk): what device k does at tick t.
A device holds V chunks of the network: chunk c of device k is stage s = c K + k, so that each stage
sends to the next device and the last device to the first. Each micro-batch m goes forward through
stages 0..VK-1 and then backward through VK-1..0 (the patent US11232356's availability rules,
checked by `validate`). The same table is drawn, simulated, and executed by `executor`, once `slots`
has given its buffers numbers.

Letters: K devices, V chunks, M micro-batches, T ticks, t tick, k device, s stage, m micro-batch.
With one chunk a stage is a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IDLE, FORWARD, BACKWARD = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Schedule:
    """A named table; `table[t, k]` is (operation, micro-batch, chunk) of device k at tick t."""

    kind: str
    table: np.ndarray  # int [T, K, 3]

    def __post_init__(self) -> None:
        validate(self.table)

    @property
    def ticks(self) -> int:
        """T, the number of ticks."""
        return self.table.shape[0]

    @property
    def stages(self) -> int:
        """K, the number of devices in the pipeline."""
        return self.table.shape[1]

    @property
    def micro_batches(self) -> int:
        """M, the number of micro-batches."""
        return int(self.table[self.table[..., 0] != IDLE][:, 1].max()) + 1

    @property
    def chunks(self) -> int:
        """V, the number of chunks on each device."""
        return int(self.table[self.table[..., 0] != IDLE][:, 2].max()) + 1

    @property
    def bubble_fraction(self) -> float:
        """Idle slots over all slots; (K-1)/(VM+K-1) for all training schedules if M >= K."""
        return float((self.table[..., 0] == IDLE).mean())

    @property
    def peak_stash(self) -> list[int]:
        """For each device, the most boundary inputs that it holds at once."""
        forward, backward = ticks_of(self.table)
        held = np.zeros((self.ticks + 1, self.stages), int)
        for (s, m), t in forward.items():
            held[t, s % self.stages] += 1
            held[(backward or forward)[s, m] + 1, s % self.stages] -= 1
        return held.cumsum(axis=0).max(axis=0).tolist()

    def __str__(self) -> str:
        return render(self)


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (GPipe, section 2.2). Stashes M micro-batches."""
    K, M = _checked(stages, micro_batches)
    ops = [(k + m, k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(M + K - 1 + (K - 1 - k) + m, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("gpipe", _table(K, ops))


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """One forward, one backward in turn (PipeDream-flush). Stage k stashes at most K - k.

    Each device does the backward that is ready, else the next forward as long as fewer than K - k
    micro-batches are under way on it.
    """
    K, M = _checked(stages, micro_batches)
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


def eager_1f1b(stages: int, micro_batches: int) -> Schedule:
    """1F1B in which all devices go forward in one tick and backward in the next.

    In one SPMD program a tick lasts as long as its slowest operation. Plain 1F1B always has some
    device in a (three times longer) backward, so its steady state takes two backward times for each
    micro-batch; here it takes a forward and a backward, as in GPipe. The price is a stash of
    2(K - k) - 1 instead of K - k. `simulate` shows both.
    """
    K, M = _checked(stages, micro_batches)
    ops = [(2 * (m + k), k, FORWARD, m) for k in range(K) for m in range(M)]
    ops += [(2 * (m + 2 * (K - 1) - k) + 1, k, BACKWARD, m) for k in range(K) for m in range(M)]
    return Schedule("eager_1f1b", _table(K, ops))


def interleaved(stages: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """`eager_1f1b` with V chunks a device, for a V-th of the bubble (Narayanan et al. 2021, 2.2).

    A group of K micro-batches, or a few more so that M need not divide by K, goes through all
    chunks before the next group starts. Forwards of all devices share ticks, and so do backwards.
    """
    K, M = _checked(stages, micro_batches)
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


def forward_only(stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The forward half of GPipe, or of `interleaved`, for evaluation."""
    K, M = _checked(stages, micro_batches)
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
CHUNKED = ("interleaved", "forward")  # those that take several chunks a device


def make(kind: str, stages: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The schedule of that name."""
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(KINDS)}")
    if kind in CHUNKED:
        return KINDS[kind](stages, micro_batches, chunks)
    if chunks != 1:
        raise ValueError(
            f"the schedule {kind!r} has one chunk on each device, got `chunks` {chunks}; "
            f"use 'interleaved'"
        )
    return KINDS[kind](stages, micro_batches)


def training_schedule(
    wanted: "str | Schedule", stages: int, micro_batches: int, chunks: int = 1
) -> Schedule:
    """`wanted`, or the schedule of that name; ValueError unless it trains that pipeline."""
    if isinstance(wanted, str):
        if wanted not in TRAINING:
            raise ValueError(f"unknown schedule {wanted!r} for training: {', '.join(TRAINING)}")
        return make(wanted, stages, micro_batches, chunks)
    if not (wanted.table[..., 0] == BACKWARD).any():
        raise ValueError(f"the schedule {wanted.kind!r} has no backwards; it cannot train")
    sizes = (wanted.stages, wanted.micro_batches)
    if sizes != (stages, micro_batches):
        raise ValueError(
            f"the schedule is for {sizes[0]} stages and {sizes[1]} micro-batches, the pipeline has "
            f"{stages} and {micro_batches}"
        )
    if chunks not in (1, wanted.chunks):
        raise ValueError(
            f"the schedule has {wanted.chunks} chunks on each device, got `chunks` {chunks}; "
            f"leave `chunks` out, as your own table says it"
        )
    return wanted


def _checked(stages: int, micro_batches: int) -> tuple[int, int]:
    for name, value in (("stages", stages), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    return stages, micro_batches


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


def ticks_of(table: np.ndarray) -> tuple[dict, dict]:
    """(stage, micro-batch) -> tick, of forwards and of backwards. Stage is chunk * K + device."""
    K = table.shape[1]
    ticks: tuple[dict, dict] = ({}, {})
    for t, k in zip(*np.nonzero(table[..., 0]), strict=True):
        op, m, chunk = (int(v) for v in table[t, k])
        key = (chunk * K + int(k), m)
        if key in ticks[op - 1]:
            name = ("forward", "backward")[op - 1]
            raise ValueError(
                f"tick {t}: the {name} of micro-batch {m} at stage {key[0]} is done twice"
            )
        ticks[op - 1][key] = int(t)
    return ticks


def validate(table: np.ndarray) -> None:
    """Raise ValueError unless every pair is done once, and only when its inputs are there.

    A device has the input activations of a micro-batch one tick after the previous stage's forward,
    and their gradients one tick after the next stage's backward.
    """
    if table.ndim != 3 or table.shape[2] != 3:
        raise ValueError(f"a schedule table has shape [ticks, stages, 3], got {table.shape}")
    unknown = np.setdiff1d(table[..., 0], (IDLE, FORWARD, BACKWARD))
    if unknown.size:
        raise ValueError(f"operations are 0 idle, 1 forward, 2 backward; got {unknown[0]}")
    forward, backward = ticks_of(table)
    if not forward:
        raise ValueError(f"a schedule table of shape {table.shape} has no forward")
    K = table.shape[1]
    stages = (max(s for s, _ in forward) // K + 1) * K
    pairs = {(s, m) for s in range(stages) for m in range(max(m for _, m in forward) + 1)}
    for name, done in (("forward", forward), ("backward", backward)):
        if done and set(done) != pairs:
            s, m = min(pairs ^ set(done))
            raise ValueError(f"the {name} of micro-batch {m} at stage {s} is missing or not wanted")
    for (s, m), t in forward.items():
        if s > 0 and forward[s - 1, m] >= t:
            raise ValueError(
                f"tick {t}: stage {s} goes forward on micro-batch {m} before it arrives"
            )
    for (s, m), t in backward.items():
        after = backward[s + 1, m] if s < stages - 1 else forward[s, m]
        if after >= t or forward[s, m] >= t:
            raise ValueError(f"tick {t}: stage {s} goes backward on micro-batch {m} too early")


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
    stages = schedule.table[..., 2] * schedule.stages + np.arange(schedule.stages)
    count = schedule.stages * schedule.chunks
    cost = np.zeros(schedule.table.shape[:2])
    for op, times in ((FORWARD, forward), (BACKWARD, backward)):
        if len(times) != count:
            raise ValueError(f"{len(times)} stage times for a schedule of {count} stages")
        cost += np.where(schedule.table[..., 0] == op, np.asarray(times, float)[stages], 0.0)
    time = float(cost.max(axis=1).sum()) if lockstep else _dependent_time(schedule, cost)
    bubble = 1 - cost.sum() / (schedule.stages * time) if time else 0.0
    return Simulation(time, float(bubble))


def _dependent_time(schedule: Schedule, cost: np.ndarray) -> float:
    forward, backward = ticks_of(schedule.table)
    K, end, free = schedule.stages, {}, [0.0] * schedule.stages
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


def render(schedule: Schedule) -> str:
    """The table as text: a row for each device, a column for each tick, F3 or B3 or a dot.

    With several chunks a device, F3.1 is the forward of micro-batch 3 through chunk 1.
    """
    several = schedule.chunks > 1
    width = len(str(schedule.micro_batches - 1)) + 2 + several * 2
    lines = ["tick    " + "".join(f"{t:>{width}}" for t in range(schedule.ticks))]
    for k in range(schedule.stages):
        cells = [
            "." if op == IDLE else f"{' FB'[op]}{m}" + several * f".{c}"
            for op, m, c in schedule.table[:, k].tolist()
        ]
        lines.append(f"stage {k:<2}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
