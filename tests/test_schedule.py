"""Schedules: the tables as they look, what holds for every (K, M), and a replay of the buffers."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpipe_jax import schedule
from gpipe_jax.schedule import (
    BACKWARD,
    FORWARD,
    IDLE,
    KINDS,
    Schedule,
    make,
    simulate,
    validate,
)
from gpipe_jax.slots import Rows, lower

GRID = list(itertools.product(range(1, 9), range(1, 13)))  # (K, M)
TRAINING = ("gpipe", "1f1b", "eager_1f1b")

PICTURES = {
    # All forwards, then all backwards; M = 4 inputs wait on every stage.
    ("gpipe", 3, 4): """
tick      0  1  2  3  4  5  6  7  8  9 10 11
stage 0  F0 F1 F2 F3  .  .  .  . B0 B1 B2 B3
stage 1   . F0 F1 F2 F3  .  . B0 B1 B2 B3  .
stage 2   .  . F0 F1 F2 F3 B0 B1 B2 B3  .  .
""",
    # The classic picture: K - k forwards, then one backward and one forward in turn.
    ("1f1b", 4, 8): """
tick      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19 20 21
stage 0  F0 F1 F2 F3  .  .  . B0 F4 B1 F5 B2 F6 B3 F7 B4  . B5  . B6  . B7
stage 1   . F0 F1 F2  .  . B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5  . B6  . B7  .
stage 2   .  . F0 F1  . B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6  . B7  .  .
stage 3   .  .  . F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7  .  .  .
""",
    # No column has both an F and a B, so no device in a forward waits for one in a backward.
    ("eager_1f1b", 3, 6): """
tick      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
stage 0  F0 F1 F2  . F3  . F4 B0 F5 B1  . B2  . B3 B4 B5
stage 1   . F0 F1  . F2 B0 F3 B1 F4 B2 F5 B3  . B4 B5  .
stage 2   .  . F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5  .  .
""",
    ("forward", 3, 4): """
tick      0  1  2  3  4  5
stage 0  F0 F1 F2 F3  .  .
stage 1   . F0 F1 F2 F3  .
stage 2   .  . F0 F1 F2 F3
""",
}


@pytest.mark.parametrize(("kind", "stages", "micro_batches"), PICTURES)
def test_the_table_looks_like_its_picture(kind: str, stages: int, micro_batches: int) -> None:
    picture = PICTURES[kind, stages, micro_batches]
    assert str(make(kind, stages, micro_batches)) == picture.strip("\n")


def test_columns_stay_aligned_from_micro_batch_10_on() -> None:
    lines = str(make("1f1b", 2, 12)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == "B11"


# ---- for every K and M --------------------------------------------------------------------------


def entries(table: np.ndarray) -> dict[tuple[int, int, int], int]:
    """(operation, stage, micro-batch) -> tick; each must occur once."""
    found: dict[tuple[int, int, int], int] = {}
    for t, k in itertools.product(range(table.shape[0]), range(table.shape[1])):
        op, m, chunk = table[t, k].tolist()
        assert chunk == 0
        if op != IDLE:
            assert (op, k, m) not in found
            found[op, k, m] = t
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_done_once_and_when_its_inputs_are_there(kind: str) -> None:
    operations = (FORWARD, BACKWARD) if kind in TRAINING else (FORWARD,)
    for K, M in GRID:
        table = make(kind, K, M)
        tick = entries(table.table)
        assert set(tick) == set(itertools.product(operations, range(K), range(M)))
        assert (table.stages, table.micro_batches) == (K, M)
        for (op, k, m), t in tick.items():
            needs = {
                FORWARD: [(FORWARD, k - 1, m)] if k > 0 else [],
                BACKWARD: [(BACKWARD, k + 1, m)] if k < K - 1 else [(FORWARD, k, m)],
            }
            assert all(tick[need] < t for need in needs[op]), (K, M, k, m)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_go_in_order_on_every_device(kind: str) -> None:
    """The order of the losses' and gradients' sums does not depend on the schedule."""
    for K, M in GRID:
        tick = entries(make(kind, K, M).table)
        for (op, k, m), t in tick.items():
            assert m == 0 or tick[op, k, m - 1] < t


@pytest.mark.parametrize("kind", KINDS)
def test_ticks_and_bubble_are_the_papers(kind: str) -> None:
    """(K-1)/(M+K-1) of the slots are idle (GPipe, section 2.3), in every schedule here."""
    for K, M in GRID:
        table = make(kind, K, M)
        assert table.ticks == (M + K - 1) * (2 if kind in TRAINING else 1)
        assert table.bubble_fraction == pytest.approx((K - 1) / (M + K - 1))


PEAK_STASH: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda K, M, k: M,
    "1f1b": lambda K, M, k: min(M, K - k),
    "eager_1f1b": lambda K, M, k: min(M, 2 * (K - k) - 1),
    "forward": lambda K, M, k: 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_peak_stash(kind: str) -> None:
    for K, M in GRID:
        wanted = [PEAK_STASH[kind](K, M, k) for k in range(K)]
        assert make(kind, K, M).peak_stash == wanted, (K, M)


def test_eager_1f1b_never_mixes_forwards_with_backwards() -> None:
    for K, M in GRID:
        operation = make("eager_1f1b", K, M).table[..., 0]
        mixed = (operation == FORWARD).any(axis=1) & (operation == BACKWARD).any(axis=1)
        assert not mixed.any()
    assert any(set(row) >= {FORWARD, BACKWARD} for row in make("1f1b", 4, 8).table[..., 0])


# ---- errors -------------------------------------------------------------------------------------


def table_of(kind: str = "gpipe", K: int = 3, M: int = 4) -> np.ndarray:
    """A sound table, to be broken, with two idle ticks at the end."""
    return np.concatenate([make(kind, K, M).table, np.zeros((2, K, 3), np.int32)])


def where(table: np.ndarray, op: int, k: int, m: int) -> int:
    """The tick of an operation."""
    return entries(table)[op, k, m]


def test_a_sound_table_is_accepted() -> None:
    for kind in KINDS:
        validate(table_of(kind))


@pytest.mark.parametrize(("op", "name"), [(FORWARD, "forward"), (BACKWARD, "backward")])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_dropped_micro_batch_is_refused(op: int, name: str, k: int) -> None:
    table = table_of()
    table[where(table, op, k, 1), k] = 0
    with pytest.raises(ValueError, match=f"the {name} of micro-batch 1 at stage {k} is missing"):
        validate(table)


@pytest.mark.parametrize(("op", "name"), [(FORWARD, "forward"), (BACKWARD, "backward")])
def test_a_micro_batch_done_twice_is_refused(op: int, name: str) -> None:
    table = table_of()
    table[13, 1] = (op, 2, 0)
    with pytest.raises(
        ValueError, match=f"tick 13: the {name} of micro-batch 2 at stage 1 is done twice"
    ):
        validate(table)


def test_a_backward_that_nobody_wants_is_refused() -> None:
    table = table_of()
    table[13, 1] = (BACKWARD, 4, 0)
    with pytest.raises(ValueError, match=r"micro-batch 4 at stage 1 is .*not wanted"):
        validate(table)


def swap(table: np.ndarray, k: int, a: int, b: int) -> None:
    table[[a, b], k] = table[[b, a], k]


def test_a_forward_before_its_input_arrives_is_refused() -> None:
    table = table_of()
    swap(table, 1, where(table, FORWARD, 1, 3), where(table, FORWARD, 1, 0))
    with pytest.raises(ValueError, match="stage 1 goes forward on micro-batch 3 before it arrives"):
        validate(table)


def test_a_forward_in_the_same_tick_as_its_input_is_made_is_refused() -> None:
    table = table_of()
    table[0, 1] = (FORWARD, 0, 0)
    table[1, 1] = 0
    with pytest.raises(ValueError, match="tick 0: stage 1 goes forward on micro-batch 0 before"):
        validate(table)


def test_a_backward_before_its_forward_is_refused() -> None:
    table = table_of()
    swap(table, 2, where(table, FORWARD, 2, 3), where(table, BACKWARD, 2, 0))
    swap(table, 2, where(table, FORWARD, 2, 3), where(table, BACKWARD, 2, 3))
    with pytest.raises(ValueError, match="stage 2 goes backward on micro-batch 3 too early"):
        validate(table)


def test_a_backward_before_its_gradient_arrives_is_refused() -> None:
    table = table_of()
    swap(table, 0, where(table, BACKWARD, 0, 0), where(table, FORWARD, 0, 3) + 1)
    with pytest.raises(ValueError, match="stage 0 goes backward on micro-batch 0 too early"):
        validate(table)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 2), (4, 2, 3, 1)])
def test_a_table_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[ticks, stages, 3\], got \(4, 2"):
        validate(np.zeros(shape, np.int32))


def test_a_device_that_does_nothing_at_all_is_refused() -> None:
    table = make("gpipe", 2, 4).table
    with pytest.raises(ValueError, match="micro-batch 0 at stage 2 is missing"):
        validate(np.concatenate([table, np.zeros_like(table[:, :1])], axis=1))


def test_a_table_with_no_forward_is_refused() -> None:
    with pytest.raises(ValueError, match="has no forward"):
        validate(np.zeros((4, 2, 3), np.int32))


@pytest.mark.parametrize("op", [-1, 3])
def test_an_unknown_operation_is_refused(op: int) -> None:
    table = table_of()
    table[13, 1] = (op, 0, 0)
    with pytest.raises(ValueError, match=f"operations are 0 idle, .* got {op}"):
        validate(table)


def test_a_schedule_is_validated_when_it_is_made() -> None:
    table = table_of()
    table[0, 0] = 0
    with pytest.raises(ValueError, match="micro-batch 0 at stage 0 is missing"):
        Schedule("mine", table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("K", "M", "name"), [(0, 1, "stages"), (1, 0, "micro_batches")])
def test_numbers_below_one_are_refused(kind: str, K: int, M: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        make(kind, K, M)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown schedule '2f2b'; known: gpipe, 1f1b, eager_1f1b"):
        make("2f2b", 2, 2)


# ---- buffers ------------------------------------------------------------------------------------


def replay(rows: Rows, K: int, T: int) -> list[tuple[int, int, str]]:
    """Run the rows as the executor does, on symbols; returns what stage 0 sends back at the end.

    At each tick every device stores what arrived, reads its operands, and sends. A device that has
    nothing to send sends rubbish, and slots start with rubbish, so that a wrong read is seen.
    """
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
            op, m = int(rows.operation[t, k]), int(rows.micro_batch[t, k])
            if op == IDLE:
                continue
            x = f"x{m}" if k == 0 else x_slots[k][rows.x_slot[t, k]]
            if op == FORWARD:
                sent_x[k] = f"F{k}({x})"
                done.append((op, k, sent_x[k]))
            else:
                g = "loss" if k == K - 1 else g_slots[k][rows.g_slot[t, k]]
                sent_g[k] = f"B{k}({x}, {g})"
                done.append((op, k, sent_g[k]))
        x_wire = ["nothing sent", *sent_x[:-1]]
        g_wire = [*sent_g[1:], "nothing sent"]
    return done


def activation(k: int, m: int) -> str:
    """Stage k's input for micro-batch m, in the symbols of `replay`."""
    return f"x{m}" if k == 0 else f"F{k - 1}({activation(k - 1, m)})"


def gradient(K: int, k: int, m: int) -> str:
    """What stage k's backward sends."""
    after = "loss" if k == K - 1 else gradient(K, k + 1, m)
    return f"B{k}({activation(k, m)}, {after})"


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_reads_the_right_slots(kind: str) -> None:
    for K, M in GRID:
        table = make(kind, K, M)
        wanted = {(FORWARD, k, activation(k + 1, m)) for k in range(K) for m in range(M)}
        if kind in TRAINING:
            wanted |= {(BACKWARD, k, gradient(K, k, m)) for k in range(K) for m in range(M)}
        done = replay(lower(table), K, table.ticks)
        assert set(done) == wanted and len(done) == len(wanted), (K, M)


def test_the_replay_sees_a_slot_that_is_reused_too_early() -> None:
    table = make("1f1b", 4, 8)
    rows = lower(table)
    crowded = rows._replace(
        receive_x=np.minimum(rows.receive_x, 2), x_slot=np.minimum(rows.x_slot, 2)
    )
    wrong = [value for *_, value in replay(crowded, 4, table.ticks)]
    right = [value for *_, value in replay(rows, 4, table.ticks)]
    assert wrong != right


X_SLOTS: dict[str, Callable[[int, int], int]] = {
    "gpipe": lambda K, M: M,
    "1f1b": lambda K, M: min(M, K),  # one that waits more than stage 1's stash of K - 1
    "eager_1f1b": lambda K, M: min(M, 2 * (K - 1)),
    "forward": lambda K, M: 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_as_few_as_promised(kind: str) -> None:
    for K, M in GRID:
        rows = lower(make(kind, K, M))
        assert rows.x_slots == (X_SLOTS[kind](K, M) if K > 1 else 0), (K, M)
        assert rows.g_slots == (1 if K > 1 and kind in TRAINING else 0), (K, M)


# ---- time ---------------------------------------------------------------------------------------


def test_simulated_times_by_hand() -> None:
    """1f1b(2, 2) is

        tick      0  1  2  3  4  5
        stage 0  F0 F1  . B0  . B1      forward 1, backward 3
        stage 1   . F0 B0 F1 B1  .      forward 2, backward 4

    In lockstep its ticks last 1 2 4 3 4 3. Otherwise stage 1 is busy from 1 on for 2 + 4 + 2 + 4,
    until 13, and stage 0 does the last backward from then to 16. 20 of the 2 x time are work.
    """
    table = make("1f1b", 2, 2)
    locked = simulate(table, [1, 2], [3, 4])
    assert (locked.time, locked.peak_stash) == (17.0, [2, 1])
    assert locked.bubble_fraction == pytest.approx(1 - 20 / 34)
    free = simulate(table, [1, 2], [3, 4], lockstep=False)
    assert (free.time, free.peak_stash) == (16.0, [2, 1])
    assert free.bubble_fraction == pytest.approx(1 - 20 / 32)
    assert type(locked.time) is type(free.time) is float


def test_a_device_without_work_takes_no_time() -> None:
    result = simulate(make("forward", 2, 3), [0, 0], [0, 0])
    assert (result.time, result.bubble_fraction) == (0.0, 0.0)


@pytest.mark.parametrize("lockstep", [True, False])
def test_equal_stages_take_the_papers_time_under_gpipe(lockstep: bool) -> None:
    for K, M in GRID:
        result = simulate(make("gpipe", K, M), [1] * K, [3] * K, lockstep=lockstep)
        assert result.time == 4 * (M + K - 1)
        assert result.bubble_fraction == pytest.approx((K - 1) / (M + K - 1))


def test_in_lockstep_classic_1f1b_is_slower_and_eager_1f1b_is_not() -> None:
    for K, M in GRID:
        time = {k: simulate(make(k, K, M), [1] * K, [3] * K).time for k in TRAINING}
        assert time["eager_1f1b"] == time["gpipe"]
        assert (time["1f1b"] > time["eager_1f1b"]) == (K > 1 and M > 1), (K, M)
    assert simulate(make("1f1b", 4, 8), [1] * 4, [3] * 4).time == 58  # against 44


def test_without_lockstep_classic_1f1b_is_as_fast_as_gpipe() -> None:
    for K, M in GRID:
        time = {k: simulate(make(k, K, M), [1] * K, [3] * K, lockstep=False).time for k in TRAINING}
        assert set(time.values()) == {4.0 * (M + K - 1)}, (K, M)


@pytest.mark.parametrize("kind", KINDS)
def test_lockstep_never_helps_and_no_device_is_faster_than_its_own_work(kind: str) -> None:
    rng = np.random.default_rng(0)
    for K, M in GRID:
        forward, backward = rng.uniform(0.5, 2, K), rng.uniform(1, 5, K)
        table = make(kind, K, M)
        locked = simulate(table, forward.tolist(), backward.tolist()).time
        free = simulate(table, forward.tolist(), backward.tolist(), lockstep=False).time
        work = M * (forward + (backward if kind in TRAINING else 0)).max()
        assert locked >= free * (1 - 1e-12) and free >= work * (1 - 1e-12)


def test_one_time_for_each_stage() -> None:
    with pytest.raises(ValueError, match="2 stage times for a schedule of 3 stages"):
        simulate(make("gpipe", 3, 2), [1, 1, 1], [3, 3])


def test_every_generator_is_known_by_name() -> None:
    assert [make(kind, 2, 2).kind for kind in KINDS] == list(KINDS)
    assert schedule.gpipe(2, 3).kind == "gpipe" and schedule.one_f_one_b(2, 3).kind == "1f1b"
