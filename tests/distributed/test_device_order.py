"""Lay stages out on fake devices that have coordinates as TPUs do."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from gpipe_jax.distributed.device_order import arrange, hops


@dataclass(frozen=True)
class Device:
    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"


def slices_of(kind: str, shape: tuple[int, int, int], cores: int = 1, count: int = 1) -> list:
    """Return devices in the order of `jax.devices()`: slice by slice; z, y, x, core in each."""
    x, y, z = shape
    return [
        Device(i, (a, b, c), core, s, device_kind=kind)
        for i, (s, c, b, a, core) in enumerate(
            itertools.product(range(count), range(z), range(y), range(x), range(cores))
        )
    ]


SLICES = {
    "v2": ("TPU v2", (2, 2, 1), 2),
    "v3": ("TPU v3", (4, 4, 1), 2),
    "v4": ("TPU v4", (4, 4, 4), 1),
    "v5e": ("TPU v5 lite", (4, 4, 1), 1),
    "v5p": ("TPU v5", (4, 4, 8), 1),
    "v6e": ("TPU v6 lite", (8, 8, 1), 1),
}


@pytest.mark.parametrize("D", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SLICES)
def test_every_stage_is_next_to_its_predecessor(name: str, D: int) -> None:
    devices = slices_of(*SLICES[name])
    K = len(devices) // D
    grid = arrange(devices, K, D)
    assert grid.shape == (K, D) and set(grid.flat) == set(devices)
    assert hops(grid)[0] <= 1


def test_in_plain_order_stages_are_apart() -> None:
    devices = np.empty(16, object)
    devices[:] = slices_of(*SLICES["v5e"])
    assert hops(devices.reshape(16, 1))[0] == 4


@pytest.mark.parametrize(("K", "D"), [(8, 4), (4, 8), (32, 1), (2, 16)])
def test_slices_follow_each_other_along_the_stages(K: int, D: int) -> None:
    """Let only one boundary in K / 2 cross the data-centre network."""
    grid = arrange(slices_of(*SLICES["v5e"], count=2), K, D)
    index = np.asarray([[device.slice_index for device in row] for row in grid])
    expected = np.repeat([0, 1], K // 2)[:, None]
    np.testing.assert_array_equal(index, np.broadcast_to(expected, (K, D)))
    for half in (grid[: K // 2], grid[K // 2 :]):
        assert hops(half)[0] <= 1


def test_slices_are_replicas_where_stages_do_not_split() -> None:
    grid = arrange(slices_of(*SLICES["v5e"], count=2), 1, 32)
    assert [device.slice_index for device in grid[0]] == [0] * 16 + [1] * 16


def test_nothing_splits_over_the_slices() -> None:
    devices = slices_of("TPU v5 lite", (3, 1, 1), count=3)
    message = "4 stages x 2 replicas do not split over 3 slices: make `stages` .* multiple of 3"
    with pytest.raises(ValueError, match=message):
        arrange(devices[:8], 4, 2)


def test_an_irregular_subset_of_a_slice() -> None:
    devices = slices_of(*SLICES["v4"])
    assert [row[0] for row in arrange(devices[:7], 7, 1)] == devices[:7]
    two_slices = slices_of(*SLICES["v4"], count=2)
    message = "7 stages x 1 replicas cannot be laid over 7 devices of a slice; use all devices"
    with pytest.raises(ValueError, match=message):
        arrange([*two_slices[:7], *two_slices[64:71]], 14, 1)
