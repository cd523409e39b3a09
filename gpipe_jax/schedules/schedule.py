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

from dataclasses import dataclass

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
    def num_devices(self) -> int:
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
        held = np.zeros((self.ticks + 1, self.num_devices), int)
        for (s, m), t in forward.items():
            held[t, s % self.num_devices] += 1
            held[(backward or forward)[s, m] + 1, s % self.num_devices] -= 1
        return held.cumsum(axis=0).max(axis=0).tolist()

    def __str__(self) -> str:
        return render(self)


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


def render(schedule: Schedule) -> str:
    """The table as text: a row for each device, a column for each tick, F3 or B3 or a dot.

    With several chunks a device, F3.1 is the forward of micro-batch 3 through chunk 1.
    """
    several = schedule.chunks > 1
    width = len(str(schedule.micro_batches - 1)) + 2 + several * 2
    lines = ["tick    " + "".join(f"{t:>{width}}" for t in range(schedule.ticks))]
    for k in range(schedule.num_devices):
        cells = [
            "." if op == IDLE else f"{' FB'[op]}{m}" + several * f".{c}"
            for op, m, c in schedule.table[:, k].tolist()
        ]
        lines.append(f"stage {k:<2}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
