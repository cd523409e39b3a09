"""Check that a cut is chosen in which all stages of a device fit together."""

import itertools

import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.partition import device_memory, solver
from gpipe_jax.partition.solver import Partition


def need(cut: Partition, held, chunks: int) -> float:
    return max(device_memory.of_devices(cut, held, [0] * len(held), chunks))


def cut_of(costs, held, limit, *, devices: int, chunks: int) -> Partition:
    def best_cut(bound: float) -> Partition:
        return solver.partition(costs, devices * chunks, memory=held, memory_limit=bound)

    return device_memory.fit(best_cut, lambda cut: need(cut, held, chunks), limit, chunks)


def test_what_devices_need_by_hand():
    cut = Partition(boundaries=(1, 3, 4), costs=(1.0,) * 4, bound=1.0, layers=6)
    held, in_use = [1, 2, 3, 4, 5, 6], [10, 20, 10, 70, 10, 20]
    assert device_memory.of_devices(cut, held, in_use, 2) == [1 + 4 + 70, 5 + 11 + 30]
    assert device_memory.of_devices(cut, held, in_use, 1) == [11, 35, 74, 41]


def test_stages_that_fit_alone_may_not_fit_together():
    """Check layers whose fastest cut gives both large stages to one device of two."""
    costs, held = [1] * 8, [3, 3, 1, 1, 3, 3, 1, 1]
    fastest = solver.partition(costs, 4, memory=held, memory_limit=10)
    assert need(fastest, held, 2) == 12
    cut = cut_of(costs, held, 10, devices=2, chunks=2)
    assert need(cut, held, 2) <= 10 and cut.bottleneck == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_is_found_where_even_stages_fit(seed):
    rng = np.random.default_rng(seed)
    devices, chunks, layers = int(rng.integers(1, 3)), int(rng.integers(1, 4)), 8
    costs, held = rng.integers(1, 9, (2, layers)).tolist()
    even = min(
        max(sum(held[i:e]) for i, e in itertools.pairwise((0, *inner, layers)))
        for inner in itertools.combinations(range(1, layers), devices * chunks - 1)
    )
    cut = cut_of(costs, held, even * chunks, devices=devices, chunks=chunks)
    assert need(cut, held, chunks) <= even * chunks


def test_one_chunk_is_cut_as_without():
    costs, held = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]
    wanted = solver.partition(costs, 3, memory=held, memory_limit=13)
    assert cut_of(costs, held, 13, devices=3, chunks=1) == wanted


def test_if_nothing_fits_it_is_the_cut_that_needs_least():
    held = [3, 3, 4, 4]
    assert need(cut_of([1] * 4, held, 6, devices=2, chunks=2), held, 2) == 7


def build(**options) -> gpipe.Pipeline:
    """Build a pipeline whose even cut has two large layers in a stage of each chunk."""
    return gpipe.Pipeline(
        gpipe.zoo.mlp((256, 256, 256, 4, 256, 256, 256, 4, 4, 4)),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example={"inputs": np.ones((4, 256), np.float32), "labels": np.zeros(4, np.int32)},
        micro_batches=2,
        schedule="interleaved",
        chunks=2,
        cost=[1.0] * 9,
        **options,
    )


def test_the_limit_of_a_device_moves_the_cut():
    """Check a limit that each stage of the free cut is below, but not those of a device."""
    free = sum(build().device_bytes().values())
    limit = 0.8 * free
    assert sum(build(memory_limit=limit).device_bytes().values()) <= limit
    with pytest.raises(ValueError, match=r"a device needs .* but `memory_limit` is"):
        build(memory_limit=0.5 * free)
