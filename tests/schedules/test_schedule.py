"""Schedules: the tables as they look, and what holds for every K, M and number of chunks V."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpipe_jax.schedules import generators
from gpipe_jax.schedules.generators import (
    KINDS,
    TRAINING,
    gpipe,
    interleaved,
    make,
    one_f_one_b,
    training_schedule,
)
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, IDLE, Schedule, render, validate
from gpipe_jax.schedules.simulation import simulate

GRID = list(itertools.product(range(1, 9), range(1, 13)))  # (K, M)
CHUNKED_GRID = list(itertools.product(range(1, 6), range(1, 13), range(1, 4)))  # (K, M, V)

PICTURES: dict[tuple, str] = {
    # All forwards, then all backwards; M = 4 inputs wait on every stage.
    ("gpipe", 3, 4): """
tick       0  1  2  3  4  5  6  7  8  9 10 11
device 0  F0 F1 F2 F3  .  .  .  . B0 B1 B2 B3
device 1   . F0 F1 F2 F3  .  . B0 B1 B2 B3  .
device 2   .  . F0 F1 F2 F3 B0 B1 B2 B3  .  .
""",
    # The classic picture: K - k forwards, then one backward and one forward in turn.
    ("1f1b", 4, 8): """
tick       0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18 19 20 21
device 0  F0 F1 F2 F3  .  .  . B0 F4 B1 F5 B2 F6 B3 F7 B4  . B5  . B6  . B7
device 1   . F0 F1 F2  .  . B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5  . B6  . B7  .
device 2   .  . F0 F1  . B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6  . B7  .  .
device 3   .  .  . F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7  .  .  .
""",
    # No column has both an F and a B, so no device in a forward waits for one in a backward.
    ("eager_1f1b", 3, 6): """
tick       0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
device 0  F0 F1 F2  . F3  . F4 B0 F5 B1  . B2  . B3 B4 B5
device 1   . F0 F1  . F2 B0 F3 B1 F4 B2 F5 B3  . B4 B5  .
device 2   .  . F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5  .  .
""",
    # Two micro-batches go through both chunks before the next two; F1.0 is the first chunk's.
    ("interleaved", 2, 4, 2): """
tick         0    1    2    3    4    5    6    7    8    9   10   11   12   13   14   15   16   17
device 0  F0.0 F1.0 F0.1 F1.1    . F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0    . B2.1 B3.1 B2.0 B3.0
device 1     . F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0    .
""",
    ("forward", 3, 4): """
tick       0  1  2  3  4  5
device 0  F0 F1 F2 F3  .  .
device 1   . F0 F1 F2 F3  .
device 2   .  . F0 F1 F2 F3
""",
    # Fewer micro-batches than devices: the ring's first waits for the first of them to come round.
    ("forward", 3, 2, 2): """
tick         0    1    2    3    4    5    6
device 0  F0.0 F1.0    . F0.1 F1.1    .    .
device 1     . F0.0 F1.0    . F0.1 F1.1    .
device 2     .    . F0.0 F1.0    . F0.1 F1.1
""",
}


@pytest.mark.parametrize("arguments", PICTURES)
def test_the_table_looks_like_its_picture(arguments: tuple) -> None:
    assert str(make(*arguments)) == PICTURES[arguments].strip("\n")


@pytest.mark.parametrize(
    ("arguments", "last"), [(("1f1b", 2, 12), "B11"), (("interleaved", 2, 12, 2), "B11.0")]
)
def test_columns_stay_aligned_from_micro_batch_10_on(arguments: tuple, last: str) -> None:
    lines = str(make(*arguments)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[-1] == last


# ---- for every K and M --------------------------------------------------------------------------


def entries(table: np.ndarray) -> dict[tuple[int, int, int], int]:
    """(operation, stage c K + k, micro-batch) -> tick; each must occur once."""
    found: dict[tuple[int, int, int], int] = {}
    for t, k in itertools.product(range(table.shape[0]), range(table.shape[1])):
        op, m, chunk = table[t, k].tolist()
        s = chunk * table.shape[1] + k
        if op != IDLE:
            assert (op, s, m) not in found
            found[op, s, m] = t
    return found


def grid_of(kind: str) -> list[tuple[int, int, int]]:
    """(K, M, V)."""
    one = [(K, M, 1) for K, M in GRID]
    return [*one, *CHUNKED_GRID] if kind in generators.CHUNKED else one


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_done_once_and_when_its_inputs_are_there(kind: str) -> None:
    operations = (FORWARD, BACKWARD) if kind in TRAINING else (FORWARD,)
    for K, M, V in grid_of(kind):
        table = make(kind, K, M, V)
        tick = entries(table.table)
        assert set(tick) == set(itertools.product(operations, range(V * K), range(M)))
        assert (table.num_devices, table.micro_batches, table.chunks) == (K, M, V)
        validate(table.table)
        for (op, s, m), t in tick.items():
            needs = {
                FORWARD: [(FORWARD, s - 1, m)] if s > 0 else [],
                BACKWARD: [(BACKWARD, s + 1, m)] if s < V * K - 1 else [(FORWARD, s, m)],
            }
            assert all(tick[need] < t for need in needs[op]), (K, M, V, s, m)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_go_in_order_on_every_device(kind: str) -> None:
    """Sum losses and gradients in an order that does not depend on the schedule."""
    for K, M, V in grid_of(kind):
        tick = entries(make(kind, K, M, V).table)
        for (op, s, m), t in tick.items():
            assert m == 0 or tick[op, s, m - 1] < t


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
    "interleaved": lambda K, M, k: min(M, 2 * (K - k) - 1),  # with one chunk
    "forward": lambda K, M, k: 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_peak_stash(kind: str) -> None:
    for K, M in GRID:
        wanted = [PEAK_STASH[kind](K, M, k) for k in range(K)]
        assert make(kind, K, M).peak_stash == wanted, (K, M)


@pytest.mark.parametrize("kind", ["eager_1f1b", "interleaved"])
def test_eager_schedules_never_mix_forwards_with_backwards(kind: str) -> None:
    for K, M, V in grid_of(kind):
        operation = make(kind, K, M, V).table[..., 0]
        mixed = (operation == FORWARD).any(axis=1) & (operation == BACKWARD).any(axis=1)
        assert not mixed.any()
    assert any(set(row) >= {FORWARD, BACKWARD} for row in make("1f1b", 4, 8).table[..., 0])


# ---- several chunks on each device --------------------------------------------------------------


def test_interleaved_with_one_chunk_is_eager_1f1b() -> None:
    for K, M in GRID:
        same = make("eager_1f1b", K, M).table
        np.testing.assert_array_equal(make("interleaved", K, M, 1).table, same)


def test_the_bubble_of_interleaved_is_a_vth() -> None:
    """(K-1)/(VM+K-1), against (K-1)/(M+K-1); fewer micro-batches than devices leave more idle."""
    for K, M, V in CHUNKED_GRID:
        for kind, both in (("interleaved", 2), ("forward", 1)):
            table = make(kind, K, M, V)
            busy = both * V * M
            wanted = both * (V * M + K - 1)
            assert (table.ticks == wanted) if M >= K or V == 1 else (table.ticks > wanted)
            assert table.bubble_fraction == pytest.approx(1 - busy / table.ticks)


def test_the_peak_stash_of_interleaved_does_not_depend_on_the_micro_batches() -> None:
    """K more for each chunk than `eager_1f1b`; groups of up to 2K-1 stash at most V of them."""
    for K, V in itertools.product(range(1, 6), range(1, 4)):
        for M in (2 * K, 3 * K, 16 * K):
            wanted = [(V + 1) * K - 1 - 2 * k for k in range(K)]
            assert interleaved(K, M, V).peak_stash == wanted, (K, M, V)
        for M in range(1, 6 * K):
            assert max(interleaved(K, M, V).peak_stash) <= V * min(M, 2 * K - 1), (K, M, V)


# ---- errors -------------------------------------------------------------------------------------


def table_of(kind: str = "gpipe", K: int = 3, M: int = 4) -> np.ndarray:
    """Return a valid table, to be broken, with two idle ticks at the end."""
    return np.concatenate([make(kind, K, M).table, np.zeros((2, K, 3), np.int32)])


def where(table: np.ndarray, op: int, k: int, m: int) -> int:
    """Return the tick of an operation."""
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
    with pytest.raises(ValueError, match="micro-batch 4 at stage 1 is not expected"):
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
    with pytest.raises(ValueError, match=r"shape \[ticks, devices, 3\], got \(4, 2"):
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
@pytest.mark.parametrize(("K", "M", "name"), [(0, 1, "num_devices"), (1, 0, "micro_batches")])
def test_numbers_below_one_are_refused(kind: str, K: int, M: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got 0"):
        make(kind, K, M)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    known = "gpipe, 1f1b, eager_1f1b, interleaved, forward"
    with pytest.raises(ValueError, match=f"unknown schedule '2f2b'; known: {known}"):
        make("2f2b", 2, 2)
    for resolve in (make, training_schedule):
        with pytest.raises(ValueError, match="'interleave'; did you mean 'interleaved'"):
            resolve("interleave", 2, 2)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "eager_1f1b"])
def test_chunks_of_a_schedule_that_has_none_are_refused(kind: str) -> None:
    message = (
        f"the schedule '{kind}' has one chunk on each device, got `chunks` 2; use 'interleaved'"
    )
    for function in (make, training_schedule):
        with pytest.raises(ValueError, match=message):
            function(kind, 2, 2, 2)


@pytest.mark.parametrize("kind", generators.CHUNKED)
@pytest.mark.parametrize("chunks", [0, -1])
def test_chunks_below_one_are_refused(kind: str, chunks: int) -> None:
    with pytest.raises(
        ValueError, match=f"`chunks` must be a whole number of at least 1, got {chunks}"
    ):
        make(kind, 2, 2, chunks)


def test_a_chunk_missing_on_one_device_is_refused() -> None:
    table = make("interleaved", 2, 3, 2).table.copy()
    table[where(table, BACKWARD, 3, 1), 1] = 0
    with pytest.raises(ValueError, match="the backward of micro-batch 1 at stage 3 is missing"):
        validate(table)
    table = make("forward", 2, 3, 2).table.copy()
    table[(table[..., 2] == 1) & (np.arange(2) == 1)] = 0  # stage 3, so 4 stages are only 3
    with pytest.raises(ValueError, match="the forward of micro-batch 0 at stage 3 is missing"):
        validate(table)


def test_a_second_chunk_before_the_first_is_through_is_refused() -> None:
    """Stage 2 is on device 0 again, and waits for stage 1 on the last device."""
    table = make("forward", 2, 2, 2).table.copy()
    swap(table, 0, where(table, FORWARD, 2, 0), where(table, FORWARD, 0, 1))
    with pytest.raises(ValueError, match="stage 2 goes forward on micro-batch 0 before it arrives"):
        validate(table)


# ---- for training -------------------------------------------------------------------------------


def test_a_pipelines_schedule_is_made_by_name_or_is_ones_own() -> None:
    made = training_schedule("interleaved", 2, 4, 3)
    np.testing.assert_array_equal(made.table, interleaved(2, 4, 3).table)
    mine = make("gpipe", 2, 4)
    assert training_schedule(mine, 2, 4) is mine


def test_a_schedule_that_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'forward'; known: gpipe, 1f1b"):
        training_schedule("forward", 2, 2)
    with pytest.raises(ValueError, match="the schedule 'forward' has no backwards; give one"):
        training_schedule(make("forward", 2, 2), 2, 2)


@pytest.mark.parametrize(("K", "M"), [(3, 4), (2, 5)])
def test_a_schedule_for_another_pipeline_is_refused(K: int, M: int) -> None:
    message = f"is for 2 devices and 4 micro-batches, but the pipeline has {K} and {M}"
    with pytest.raises(ValueError, match=message):
        training_schedule(make("gpipe", 2, 4), K, M)


# ---- time ---------------------------------------------------------------------------------------


def test_simulated_times_by_hand() -> None:
    """1f1b(2, 2) is

        tick       0  1  2  3  4  5
        device 0  F0 F1  . B0  . B1      forward 1, backward 3
        device 1   . F0 B0 F1 B1  .      forward 2, backward 4

    In lockstep its ticks last 1 2 4 3 4 3. Otherwise stage 1 is busy from 1 on for 2 + 4 + 2 + 4,
    until 13, and stage 0 does the last backward from then to 16. 20 of the 2 x time are work.
    """
    table = make("1f1b", 2, 2)
    locked = simulate(table, [1, 2], [3, 4])
    assert locked.time == 17.0 and table.peak_stash == [2, 1]
    assert locked.bubble_fraction == pytest.approx(1 - 20 / 34)
    free = simulate(table, [1, 2], [3, 4], lockstep=False)
    assert free.time == 16.0
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


@pytest.mark.parametrize("lockstep", [True, False])
def test_equal_chunks_take_a_vth_of_the_bubbles_time(lockstep: bool) -> None:
    """Give a stage with a V-th of the layers a V-th of the time."""
    for K, M, V in CHUNKED_GRID:
        if M >= K:
            times = [1 / V] * (K * V), [3 / V] * (K * V)
            result = simulate(interleaved(K, M, V), *times, lockstep=lockstep)
            assert result.time == pytest.approx(4 * (M + (K - 1) / V)), (K, M, V)
            assert result.bubble_fraction == pytest.approx((K - 1) / (V * M + K - 1))


def test_simulated_times_of_chunks_by_hand() -> None:
    """forward(2, 2) of two chunks: stages 0 and 2 on device 0, stages 1 and 3 on device 1.

        tick         0    1    2    3    4
        device 0  F0.0 F1.0 F0.1 F1.1    .      stage 0 takes 1, stage 2 takes 5
        device 1     . F0.0 F1.0 F0.1 F1.1      stage 1 takes 2, stage 3 takes 3

    In lockstep its ticks last 1 2 5 5 3. Otherwise device 0 has F0.1 from 3 to 8, F1.1 to 13, and
    device 1 ends with F1.1 from 13 to 16. 22 of the 2 x 16 are work.
    """
    for lockstep in (True, False):
        result = simulate(make("forward", 2, 2, 2), [1, 2, 5, 3], [0] * 4, lockstep=lockstep)
        assert (result.time, result.bubble_fraction) == (16.0, pytest.approx(1 - 22 / 32))


def test_one_time_for_each_stage() -> None:
    with pytest.raises(ValueError, match="got 2 times of stages for a schedule of 3 stages"):
        simulate(make("gpipe", 3, 2), [1, 1, 1], [3, 3])
    with pytest.raises(ValueError, match="got 3 times of stages for a schedule of 6 stages"):
        simulate(interleaved(3, 3, 2), [1, 1, 1], [3] * 6)


def test_every_generator_is_known_by_name() -> None:
    assert [make(kind, 2, 2).kind for kind in KINDS] == list(KINDS)
    assert interleaved(2, 3).kind == "interleaved"
    assert generators.gpipe(2, 3).kind == "gpipe" and generators.one_f_one_b(2, 3).kind == "1f1b"


def test_idle_entries_have_no_chunk():
    table = make("gpipe", 2, 3).table.copy()
    table[0, 1, 2] = 4
    assert Schedule("mine", table).chunks == 1


def test_a_schedule_of_other_chunks_is_refused():
    with pytest.raises(ValueError, match=r"2 chunks .* 3"):
        training_schedule(interleaved(2, 4, 2), 2, 4, 3)


# --- drawing in a line's width --------------------------------------------------------------------


def test_a_wide_table_is_folded():
    text = render(gpipe(2, 8), 40)
    assert (
        text
        == """\
tick       0  1  2  3  4  5  6  7  8  9
device 0  F0 F1 F2 F3 F4 F5 F6 F7  .  .
device 1   . F0 F1 F2 F3 F4 F5 F6 F7 B0

tick      10 11 12 13 14 15 16 17
device 0  B0 B1 B2 B3 B4 B5 B6 B7
device 1  B1 B2 B3 B4 B5 B6 B7  ."""
    )
    assert render(gpipe(2, 8)) == str(gpipe(2, 8)) == render(gpipe(2, 8), 64)


def test_of_a_huge_table_the_middle_is_left_out_and_named():
    text = render(one_f_one_b(12, 100), 60)
    *table, note = text.splitlines()
    assert note == "ticks 6 to 216 are left out at ~, as the table is too wide"
    assert len(table) == 13 and max(map(len, table)) <= 60
    assert table[0] == "tick         0   1   2   3   4   5   ~ 217 218 219 220 221"
    assert table[1] == "device 0    F0  F1  F2  F3  F4  F5   ~ B97   . B98   . B99"
    assert table[12] == "device 11    .   .   .   .   .   .   ~   .   .   .   .   ."


@pytest.mark.parametrize("width", [1, 20, 79, 200])
@pytest.mark.parametrize(("K", "M", "V"), [(1, 1, 1), (4, 8, 1), (3, 40, 2), (64, 32, 1)])
def test_no_line_is_wider_than_asked(width, K, M, V):
    schedule = make("interleaved" if V > 1 else "1f1b", K, M, V)
    widest = max(map(len, render(schedule, width).splitlines()[: K + 1]))
    assert widest <= max(width, 40)
