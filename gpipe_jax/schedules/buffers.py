"""Allocate the buffers of a schedule: a slot for each arrival until its last use.

Pure numpy, no JAX.
"""

from typing import NamedTuple

import numpy as np

from gpipe_jax.schedules.schedule import Schedule, ticks_of


class BufferTable(NamedTuple):
    """Hold a schedule with its buffers allocated, as the executor runs it.

    Arrays are int32 [T, K]. Boundaries and gradients that arrive stay in numbered slots until their
    last use.
    """

    micro_batch: np.ndarray
    receive_x: np.ndarray  # slot for the activation that arrived with this tick, or -1
    receive_g: np.ndarray  # slot for the gradient that arrived with this tick, or -1
    x_slot: np.ndarray  # slot of the activation that this tick's operation reads
    g_slot: np.ndarray  # slot of the gradient that this tick's operation reads
    x_slots: int  # number of slots for activations on each device
    g_slots: int  # number of slots for gradients on each device


def lower(schedule: Schedule) -> BufferTable:
    """Give each arriving activation and gradient the lowest slot that is free on its device.

    The chunks of a device share its slots.
    """
    table, M = schedule.table, schedule.micro_batches
    S = schedule.num_devices * schedule.chunks
    forward, backward = ticks_of(table)
    last_use = backward or forward
    spans_x = {
        (s, m): (forward[s - 1, m] + 1, last_use[s, m]) for s in range(1, S) for m in range(M)
    }
    spans_g = {}
    if backward:
        spans_g = {
            (s, m): (backward[s + 1, m] + 1, backward[s, m]) for s in range(S - 1) for m in range(M)
        }
    receive_x, x_slot, x_slots = _allocate(spans_x, table)
    receive_g, g_slot, g_slots = _allocate(spans_g, table)
    return BufferTable(table[..., 1], receive_x, receive_g, x_slot, g_slot, x_slots, g_slots)


def _allocate(spans: dict, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Allocate slots for the values of stage s that live from tick a to b: {(s, m): (a, b)}.

    Returns the slot that receives at each entry, or -1; the slot that is read; the slots needed.
    """
    K = table.shape[1]
    receive = np.full(table.shape[:2], -1, np.int32)
    read = np.zeros(table.shape[:2], np.int32)
    slots: dict[tuple[int, int], int] = {}
    busy: dict[int, list[int]] = {}  # device -> for each of its slots, the tick of its last use
    for (s, m), (a, b) in sorted(spans.items(), key=lambda item: item[1]):
        ends = busy.setdefault(s % K, [])
        slot = next((i for i, end in enumerate(ends) if end < a), len(ends))
        ends[slot : slot + 1] = [b]
        slots[s, m], receive[a, s % K] = slot, slot
    for t, k in zip(*np.nonzero(table[..., 0]), strict=True):
        _, m, chunk = table[t, k]
        read[t, k] = slots.get((chunk * K + k, m), 0)
    return receive, read, max((len(ends) for ends in busy.values()), default=0)
