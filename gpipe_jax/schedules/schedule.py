"""Define schedules as data: who does what, when. Pure numpy, no JAX.

A schedule is a table [T, K, 3] of (operation, micro-batch, chunk): what device k does at tick t.
A device holds V chunks of the network. Chunk c of device k is stage s = c K + k, so each stage
sends to the next device, and the last device to the first. Each micro-batch m goes forward through
stages 0..VK-1 and then backward through VK-1..0. `validate` checks the availability rules of the
patent US11232356.

The same table is drawn (`render`, `plots.schedule`), simulated (`simulation`) and executed
(`pipeline.executor`, after `buffers` has numbered its buffers).

Letters: K devices, V chunks, M micro-batches, T ticks, t tick, k device, s stage, m micro-batch.
With one chunk a stage is a device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

IDLE, FORWARD, BACKWARD = 0, 1, 2
_MOST_LINES = 60  # of a drawing in text that is folded


@dataclass(frozen=True, eq=False)
class Schedule:
    """Hold a checked schedule table under a name.

    Args:
        kind: The name, for messages and drawings.
        table: Integers [T, K, 3]. `table[t, k]` is (operation, micro-batch, chunk) of device k at
            tick t; the operations are `IDLE`, `FORWARD` and `BACKWARD`.

    Raises:
        ValueError: A micro-batch is missing, repeated or not yet available somewhere.

    Example:
        >>> Schedule("mine", np.array([[[1, 0, 0]], [[2, 0, 0]]])).ticks
        2
    """

    kind: str
    table: np.ndarray

    def __post_init__(self) -> None:
        validate(self.table)

    @property
    def ticks(self) -> int:
        """Return T, the number of ticks."""
        return self.table.shape[0]

    @property
    def num_devices(self) -> int:
        """Return K, the number of devices in the pipeline."""
        return self.table.shape[1]

    @property
    def micro_batches(self) -> int:
        """Return M, the number of micro-batches."""
        return int(self.table[self.table[..., 0] != IDLE][:, 1].max()) + 1

    @property
    def chunks(self) -> int:
        """Return V, the number of chunks on each device."""
        return int(self.table[self.table[..., 0] != IDLE][:, 2].max()) + 1

    @property
    def bubble_fraction(self) -> float:
        """Return the share of idle entries; (K-1)/(VM+K-1) for all training schedules if M >= K."""
        return float((self.table[..., 0] == IDLE).mean())

    @property
    def peak_stash(self) -> list[int]:
        """Return the largest number of stashed inputs on each device."""
        forward, backward = ticks_of(self.table)
        held = np.zeros((self.ticks + 1, self.num_devices), int)
        for (s, m), t in forward.items():
            held[t, s % self.num_devices] += 1
            held[(backward or forward)[s, m] + 1, s % self.num_devices] -= 1
        return held.cumsum(axis=0).max(axis=0).tolist()

    def __str__(self) -> str:
        return render(self)


def ticks_of(table: np.ndarray) -> tuple[dict, dict]:
    """Return {(stage, micro-batch): tick} of the forwards, and of the backwards."""
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
    """Check that each pair of stage and micro-batch is done once, after its inputs arrive.

    A device has the input of a micro-batch one tick after the previous stage's forward, and the
    gradient of its output one tick after the next stage's backward. Raises ValueError.
    """
    if table.ndim != 3 or table.shape[2] != 3:
        raise ValueError(f"a schedule table has shape [ticks, devices, 3], got {table.shape}")
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
            problem = "is missing" if (s, m) in pairs else "is not expected"
            raise ValueError(f"the {name} of micro-batch {m} at stage {s} {problem}")
    for (s, m), t in forward.items():
        if s > 0 and forward[s - 1, m] >= t:
            raise ValueError(
                f"tick {t}: stage {s} goes forward on micro-batch {m} before it arrives"
            )
    for (s, m), t in backward.items():
        after = backward[s + 1, m] if s < stages - 1 else forward[s, m]
        if after >= t or forward[s, m] >= t:
            raise ValueError(f"tick {t}: stage {s} goes backward on micro-batch {m} too early")


def render(schedule: Schedule, width: int | None = None) -> str:
    """Draw a schedule as text: a row for each device, a column for each tick.

    Args:
        schedule: The schedule to draw.
        width: Characters of a line. A wider table is folded; if that takes more than
            60 lines, ticks in the middle are left out, and the last line says which. Default: no
            limit.

    Returns:
        The drawing. F3 is the forward of micro-batch 3, B3 its backward, and a dot is idle. With
        several chunks on a device, F3.1 is the forward through chunk 1.

    Example:
        >>> from gpipe_jax.schedules import gpipe
        >>> print(render(gpipe(1, 2)))
        tick       0  1  2  3
        device 0  F0 F1 B0 B1
    """
    several = schedule.chunks > 1
    most = schedule.micro_batches - 1
    cells = [[str(t) for t in range(schedule.ticks)]]
    for k in range(schedule.num_devices):
        row = schedule.table[:, k].tolist()
        cells.append([_cell(op, m, c if several else None) for op, m, c in row])
    longest = len(f"F{most}.{schedule.chunks - 1}" if several else f"F{most}")
    column = max(longest, len(cells[0][-1])) + 1
    names = ["tick", *(f"device {k}" for k in range(schedule.num_devices))]
    lead = max(map(len, names)) + 1
    fitting = schedule.ticks if width is None else max((width - lead) // column, 3)

    def block(ticks: Iterable[int | None]) -> str:
        """Return the table of some ticks; None is a mark for ticks that are left out."""
        columns = list(ticks)
        lines = []
        for name, row in zip(names, cells, strict=True):
            texts = ("~" if t is None else row[t] for t in columns)
            lines.append(f"{name:<{lead}}" + "".join(f"{text:>{column}}" for text in texts))
        return "\n".join(lines)

    starts = range(0, schedule.ticks, fitting)
    if len(starts) * len(names) <= _MOST_LINES or len(starts) == 1:
        ends = [min(start + fitting, schedule.ticks) for start in starts]
        return "\n\n".join(block(range(*ends_of)) for ends_of in zip(starts, ends, strict=True))
    first = fitting // 2
    last = schedule.ticks - (fitting - 1 - first)
    shown = block([*range(first), None, *range(last, schedule.ticks)])
    return f"{shown}\nticks {first} to {last - 1} are left out at ~, as the table is too wide"


def _cell(operation: int, micro_batch: int, chunk: int | None) -> str:
    if operation == IDLE:
        return "."
    letter = "F" if operation == FORWARD else "B"
    return f"{letter}{micro_batch}" if chunk is None else f"{letter}{micro_batch}.{chunk}"
