"""Compare the partitioner with all cuts, or with another exact method where there are many."""

import itertools
import math
import time

import numpy as np
import pytest

from gpipe_jax.partition.solver import Partition, explicit, partition

GIB = 2**30


def enumerate_cuts(layers, stages):
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield inner, list(itertools.pairwise((0, *inner, layers)))


def brute_force(costs, stages, *, transfer, memory, memory_limit, padding, objective="bottleneck"):
    """Return the least (bottleneck, padding, sum of squares) over all cuts, or None."""
    keys = []
    for _, ranges in enumerate_cuts(len(costs), stages):
        if max(sum(memory[i:e]) for i, e in ranges) > memory_limit:
            continue
        spent = [sum(costs[i:e]) + (transfer[e - 1] if e < len(costs) else 0) for i, e in ranges]
        squares = sum(cost**2 for cost in spent)
        key = (max(spent), max(sum(padding[i:e]) for i, e in ranges), squares)
        keys.append(key if objective == "bottleneck" else squares)
    return min(keys, default=None)


def key_of(result: Partition, padding, objective):
    squares = sum(cost**2 for cost in result.costs)
    largest = max(sum(padding[i] for i in stage) for stage in result.layer_ranges)
    return (result.bottleneck, largest, squares) if objective == "bottleneck" else squares


def greedy_optimum(costs, stages):
    """Return the least bottleneck without transfers: the first candidate that filling up meets."""

    def stages_needed(limit):
        needed, held = 1, 0.0
        for cost in costs:
            if held + cost > limit * (1 + 1e-12):
                needed, held = needed + 1, 0.0
            held += cost
        return needed

    candidates = np.unique([s for i in range(len(costs)) for s in np.cumsum(costs[i:])])
    candidates = candidates[candidates >= max(costs)]
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if stages_needed(candidates[middle]) <= stages:
            high = middle
        else:
            low = middle + 1
    return candidates[low]


def assert_cut(result: Partition, layers, stages):
    """Contiguous, complete, no empty stage, bound kept."""
    assert [i for stage in result.layer_ranges for i in stage] == list(range(layers))
    assert len(result.layer_ranges) == len(result.costs) == stages
    assert all(len(stage) > 0 for stage in result.layer_ranges)
    assert result.bottleneck >= result.bound * (1 - 1e-12)


@pytest.mark.parametrize("objective", ["bottleneck", "variance"])
@pytest.mark.parametrize("layers", range(1, 9))
def test_partition_equals_enumeration(layers, objective):
    rng = np.random.default_rng(layers)
    fits = 0
    for stages, _ in itertools.product(range(1, layers + 1), range(12)):
        high = int(rng.choice([2, 4, 20]))  # small numbers tie often
        costs, transfer, memory, padding = rng.integers(0, high, (4, layers)).tolist()
        limit = int(rng.integers(max(1, *memory), sum(memory) + 2))
        given = {"transfer": transfer, "memory": memory, "memory_limit": limit, "padding": padding}
        best = brute_force(costs, stages, objective=objective, **given)
        if best is None:
            with pytest.raises(ValueError, match="no cut into"):
                partition(costs, stages, objective=objective, **given)
            continue
        fits += 1
        result = partition(costs, stages, objective=objective, **given)
        assert_cut(result, layers, stages)
        assert key_of(result, padding, objective) == best
        assert max(sum(memory[i] for i in stage) for stage in result.layer_ranges) <= limit
        assert explicit(result.boundaries, costs, stages=stages, transfer=transfer) == result
    assert fits > 0


PEERS = {  # greedy and uniform rules of other libraries: up to 1.8 times the optimum
    "uniform": (lambda rng: rng.uniform(1, 10, 32), 8),
    "lognormal": (lambda rng: rng.lognormal(size=32), 8),
    "decreasing": (lambda rng: np.sort(rng.uniform(1, 10, 16))[::-1], 4),
    "embed_and_head": (lambda _: np.array([20.0] + [10.0] * 24 + [50.0]), 8),
    "one_large": (lambda _: np.array([10.0, 1.0, 1.0, 1.0]), 2),
}


@pytest.mark.parametrize("case", PEERS)
def test_partition_is_optimal_where_peers_are_not(case):
    draw, stages = PEERS[case]
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = draw(rng)
        result = partition(costs, stages)
        assert_cut(result, len(costs), stages)
        assert result.bottleneck / greedy_optimum(costs.tolist(), stages) == pytest.approx(1, 1e-12)


def test_partition_of_gpipes_deepest_model():
    costs = np.random.default_rng(0).lognormal(size=1663)
    start_s = time.monotonic()
    result = partition(costs, 128, padding=np.ones(1663))
    assert time.monotonic() - start_s < 30  # about 2 s on two cores
    assert_cut(result, 1663, 128)
    assert result.bottleneck == pytest.approx(greedy_optimum(costs.tolist(), 128), rel=1e-12)
    assert result.imbalance < 1.11


def test_bottleneck_ties_go_to_the_least_padding():
    costs, padding = [4, 1, 1, 2], [0, 5, 5, 1]
    assert partition(costs, 3).boundaries == (1, 3)  # by variance: 4, 2, 2
    assert partition(costs, 3, padding=padding).boundaries == (1, 2)  # largest 6, not 10
    assert partition(costs, 3, padding=[0, 1, 1, 9]).boundaries == (1, 3)


def test_padding_ties_go_to_the_least_variance():
    costs, padding = [6, 1, 1, 1, 1], [7, 1, 1, 1, 1]
    assert partition(costs, 3, padding=padding).boundaries == (1, 3)


def test_rounding_does_not_break_ties():
    # 0.1 + 0.2 > 0.3 by rounding, so (2, 3) is as good as (1, 2) only within a tolerance
    assert partition([0.1, 0.2, 0.3, 0.0], 3, padding=[1, 1, 5, 5]).boundaries == (2, 3)


def test_objectives_differ():
    assert partition([4, 2, 6, 1], 3).costs == (6, 6, 1)
    assert partition([4, 2, 6, 1], 3, objective="variance").costs == (4, 2, 7)


def test_transfer_moves_the_cut_and_is_not_paid_at_the_end():
    costs = [2, 2, 2, 2]
    assert partition(costs, 2).boundaries == (2,)
    assert partition(costs, 2, transfer=[0, 9, 0, 9]).boundaries == (1,)
    assert partition(costs, 2, transfer=[0, 9, 0, 9]).costs == (2.0, 6.0)


def test_memory_limit_moves_the_cut():
    assert partition([1] * 4, 2, memory=[3, 3, 1, 1], memory_limit=5).boundaries == (1,)


def test_description():
    result = partition([10, 1, 1, 1], 2)
    assert result == Partition((1,), (10.0, 3.0), bound=10.0, layers=4)
    assert result.layer_ranges == [range(0, 1), range(1, 4)]
    assert result.bottleneck == 10 and result.imbalance == pytest.approx(10 / 6.5)
    assert partition([1, 2, 3], 1).layer_ranges == [range(3)]
    assert partition([0, 0], 2).imbalance == 1.0  # 0 / 0: even


INPUT_ERRORS = {
    "few": ({"costs": [1, 2], "stages": 3}, r"2 layers into 3 stages.*use 1 to 2 stages"),
    "none": ({"stages": 0}, r"4 layers into 0 stages"),
    "negative": ({"costs": [1, -2, 1, 1]}, r"costs of layer 1 is -2.0: give a finite number"),
    "nan": ({"costs": [1, 1, math.nan, 1]}, r"costs of layer 2 is nan"),
    "infinite": ({"transfer": [1, 1, 1, math.inf]}, r"transfer of layer 3 is inf"),
    "named": (
        {"costs": [1, -2, 1, 1], "names": ["a", "conv", "c", "d"]},
        r"costs of layer 1 \(conv\) is -2.0",
    ),
    "transfer": ({"transfer": [1, 1, 1]}, r"4 costs but 3 transfer: give one per layer"),
    "memory": ({"memory": [1]}, r"4 costs but 1 memory"),
    "names": ({"names": ["a"]}, r"4 costs but 1 names"),
    "limit_alone": ({"memory_limit": GIB}, r"memory is missing: .*needs the memory of each layer"),
    "limit_zero": ({"memory": [1] * 4, "memory_limit": 0}, r"memory_limit is 0 bytes.*above 0"),
    "large": (
        {"memory": [GIB, 3 * GIB, 1, 1], "memory_limit": 2 * GIB, "names": ["a", "moe", "c", "d"]},
        r"layer 1 \(moe\) alone needs 3.00 GiB, above memory_limit 2.00 GiB: raise.* shrink or",
    ),
}


@pytest.mark.parametrize("case", INPUT_ERRORS)
def test_input_errors(case):
    changes, message = INPUT_ERRORS[case]
    given = {"costs": [1, 1, 1, 1], "stages": 2, **changes}
    with pytest.raises(ValueError, match=message):
        partition(**given)
    with pytest.raises(ValueError, match=message):
        explicit([2], **given)


def test_padding_and_objective_errors():
    with pytest.raises(ValueError, match="2 costs but 1 padding"):
        partition([1, 1], 2, padding=[1])
    with pytest.raises(ValueError, match="objective is 'mean': use 'bottleneck' or 'variance'"):
        partition([1, 1], 2, objective="mean")  # type: ignore[arg-type]


def test_no_cut_fits():
    message = (
        "into 2 stages fits: .*at least 4.00 GiB, memory_limit is 3.00 GiB: use 4 or more stages"
    )
    with pytest.raises(ValueError, match=message):
        partition([1] * 4, 2, memory=[2 * GIB] * 4, memory_limit=3 * GIB)
    assert partition([1] * 4, 4, memory=[2 * GIB] * 4, memory_limit=3 * GIB).boundaries == (1, 2, 3)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([1], r"3 stages need 2 boundaries, got 1: give the first layer"),
        ([0, 2], r"boundary 0 is out of range: of 4 layers.* 1 to 3"),
        ([1, 4], r"boundary 4 is out of range"),
        ([2, 2], r"must increase, got 2 then 2: a stage would be empty"),
        ([1.5, 2], r"boundary 1.5 is not an index of a layer: give integers"),
        ([3, 1], r"must increase, got 3 then 1"),
        ([1, 2], r"stage 2 alone needs 4.00 GiB, above memory_limit 3.00 GiB"),
    ],
)
def test_explicit_errors(boundaries, message):
    with pytest.raises(ValueError, match=message):
        explicit(boundaries, [1] * 4, stages=3, memory=[2 * GIB] * 4, memory_limit=3 * GIB)


def test_explicit_describes_the_cut():
    result = explicit([1], [10, 1, 1], stages=2, transfer=[2, 7, 7])
    assert result == Partition((1,), (12.0, 2.0), bound=10.0, layers=3)
