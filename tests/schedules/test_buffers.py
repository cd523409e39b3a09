"""Buffers of schedules: a replay, in plain Python, of what every device stores, reads and sends."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpipe_jax.schedules.buffers import BufferTable, lower
from gpipe_jax.schedules.generators import CHUNKED, KINDS, TRAINING, make
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, IDLE, Schedule

GRID = list(itertools.product(range(1, 9), range(1, 13)))  # (K, M)


def schedules(kind: str) -> list[Schedule]:
    """For every K and M; where it may have several chunks, on up to 5 devices of 2 and 3 too."""
    chunked = [(K, M, V) for K, M in GRID for V in (2, 3) if K <= 5 and kind in CHUNKED]
    return [make(kind, *sizes) for sizes in [*GRID, *chunked]]


def replay(schedule: Schedule, rows: BufferTable) -> list[tuple[int, int, str]]:
    """Run the rows as the executor does, on symbols: (operation, stage, what it sends) in turn.

    At each tick every device stores what arrived, reads its operands, and sends to the next device
    of the ring and to the one before. A device that has nothing to send sends rubbish, and slots
    start with rubbish, so that a wrong read is seen.
    """
    T, K = schedule.table.shape[:2]
    last = K * schedule.chunks - 1
    x_slots = [["never written"] * rows.x_slots for _ in range(K)]
    g_slots = [["never written"] * rows.g_slots for _ in range(K)]
    x_wire, g_wire = ["nothing sent"] * K, ["nothing sent"] * K
    done = []
    for t in range(T):
        sent_x, sent_g = [f"rubbish of tick {t}"] * K, [f"rubbish of tick {t}"] * K
        for k in range(K):
            assert -1 <= rows.receive_x[t, k] < rows.x_slots
            assert -1 <= rows.receive_g[t, k] < rows.g_slots
            if rows.receive_x[t, k] >= 0:
                x_slots[k][rows.receive_x[t, k]] = x_wire[k]
            if rows.receive_g[t, k] >= 0:
                g_slots[k][rows.receive_g[t, k]] = g_wire[k]
            op, m = int(schedule.table[t, k, 0]), int(rows.micro_batch[t, k])
            if op == IDLE:
                continue
            s = int(schedule.table[t, k, 2]) * K + k
            x = f"x{m}" if s == 0 else x_slots[k][rows.x_slot[t, k]]
            if op == FORWARD:
                sent_x[k] = f"F{s}({x})"
                done.append((op, s, sent_x[k]))
            else:
                g = "loss" if s == last else g_slots[k][rows.g_slot[t, k]]
                sent_g[k] = f"B{s}({x}, {g})"
                done.append((op, s, sent_g[k]))
        x_wire = [sent_x[k - 1] for k in range(K)]
        g_wire = [sent_g[(k + 1) % K] for k in range(K)]
    return done


def wanted(schedule: Schedule) -> set[tuple[int, int, str]]:
    """Return what `replay` must give, in the same symbols."""
    last, trains = schedule.num_devices * schedule.chunks - 1, schedule.kind in TRAINING
    found = set()
    for m in range(schedule.micro_batches):
        inputs = [f"x{m}"]
        for s in range(last + 1):
            inputs.append(f"F{s}({inputs[s]})")
            found.add((FORWARD, s, inputs[s + 1]))
        gradient = "loss"
        for s in range(last, -1, -1) if trains else ():
            gradient = f"B{s}({inputs[s]}, {gradient})"
            found.add((BACKWARD, s, gradient))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_reads_the_right_slots(kind: str) -> None:
    """So no slot is overwritten before its last use, whatever K, M and V."""
    for schedule in schedules(kind):
        done = replay(schedule, lower(schedule))
        assert set(done) == wanted(schedule) and len(done) == len(set(done)), str(schedule)


@pytest.mark.parametrize(("kind", "K", "M", "V"), [("1f1b", 4, 8, 1), ("interleaved", 3, 7, 2)])
def test_the_replay_sees_a_slot_that_is_reused_too_early(kind: str, K: int, M: int, V: int) -> None:
    schedule = make(kind, K, M, V)
    rows = lower(schedule)
    fewer = rows.x_slots - 2
    crowded = rows._replace(
        receive_x=np.minimum(rows.receive_x, fewer), x_slot=np.minimum(rows.x_slot, fewer)
    )
    assert set(replay(schedule, crowded)) != wanted(schedule)
    if rows.g_slots > 1:
        crowded = rows._replace(receive_g=np.minimum(rows.receive_g, 0), g_slot=0 * rows.g_slot)
        assert set(replay(schedule, crowded)) != wanted(schedule)


def test_the_replay_sees_chunks_mixed_up() -> None:
    schedule = make("interleaved", 2, 4, 2)
    rows = lower(schedule)
    swapped = rows._replace(x_slot=np.where(schedule.table[..., 2] == 1, 0, rows.x_slot))
    assert set(replay(schedule, swapped)) != wanted(schedule)


# ---- how many -----------------------------------------------------------------------------------

X_SLOTS: dict[str, Callable[[int, int], int]] = {
    "gpipe": lambda K, M: M,
    "1f1b": lambda K, M: min(M, K),  # one that waits more than stage 1's stash of K - 1
    "eager_1f1b": lambda K, M: min(M, 2 * (K - 1)),
    "interleaved": lambda K, M: min(M, 2 * (K - 1)),  # with one chunk
    "forward": lambda K, M: 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_as_few_as_promised(kind: str) -> None:
    for K, M in GRID:
        rows = lower(make(kind, K, M))
        assert rows.x_slots == (X_SLOTS[kind](K, M) if K > 1 else 0), (K, M)
        assert rows.g_slots == (1 if K > 1 and kind in TRAINING else 0), (K, M)


def most_waiting(schedule: Schedule) -> tuple[int, int]:
    """Return the most inputs, and the most gradients, on one device between arrival and use."""
    T, K = schedule.table.shape[:2]
    tick = {}
    for t, k in itertools.product(range(T), range(K)):
        op, m, chunk = schedule.table[t, k].tolist()
        tick[op, chunk * K + k, m] = t
    inputs, gradients = np.zeros((T, K), int), np.zeros((T, K), int)
    for op, s, m in tick:
        if op == BACKWARD and s > 0:
            inputs[tick[FORWARD, s - 1, m] + 1 : tick[BACKWARD, s, m] + 1, s % K] += 1
            gradients[tick[BACKWARD, s, m] + 1 : tick[BACKWARD, s - 1, m] + 1, (s - 1) % K] += 1
    return int(inputs.max()), int(gradients.max())


@pytest.mark.parametrize(("K", "M", "V"), [(2, 5, 2), (3, 3, 2), (3, 7, 3), (4, 9, 2), (1, 4, 3)])
def test_interleaved_has_no_more_slots_than_values_that_wait(K: int, M: int, V: int) -> None:
    """Share the slots of a device among its chunks."""
    schedule = make("interleaved", K, M, V)
    rows = lower(schedule)
    assert (rows.x_slots, rows.g_slots) == most_waiting(schedule)


def test_slots_of_interleaved_do_not_depend_on_the_micro_batches() -> None:
    for K, V in itertools.product((2, 3, 4), (1, 2, 3)):
        few, many = (lower(make("interleaved", K, M, V)) for M in (2 * K, 10 * K))
        assert (few.x_slots, few.g_slots) == (many.x_slots, many.g_slots) == ((V + 1) * K - 2, 1)


def test_rows_are_those_of_the_schedule() -> None:
    schedule = make("interleaved", 3, 6, 2)
    rows = lower(schedule)
    np.testing.assert_array_equal(rows.micro_batch, schedule.table[..., 1])
    arrays = [a for a in rows if isinstance(a, np.ndarray)]
    assert len(arrays) == 5 and {a.shape for a in arrays} == {schedule.table.shape[:2]}
    assert {a.dtype for a in arrays} == {np.dtype(np.int32)}
