"""Choose the device of each stage, such that neighbouring stages are neighbouring devices.

On a TPU the stages snake through the torus, here K = 8 stages on 4 x 2 chips (D = 1):

    0 - 1 - 2 - 3
                |          every link is between neighbours;
    7 - 6 - 5 - 4          in plain order 3 -> 4 would be 4 links long

With D replicas each position has D devices, one for each replica. Letters: K devices along the
stage axis, D replicas, n slices.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from gpipe_jax.errors import ArgumentError


def arrange(devices: Sequence[Any], num_devices: int, replicas: int) -> np.ndarray:
    """Return the devices [K, D]; there must be `num_devices * replicas` of them.

    Slices of TPUs are connected only by the data-centre network. They follow each other along the
    stages, because only boundary activations pass from stage to stage. If the stages do not split
    over the slices, the replicas do. Within a slice the stages snake through the torus.

    Raises ValueError if neither splits, or if the devices of several slices are not blocks.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_devices % slices and replicas % slices:
        raise ArgumentError(
            "stages",
            f"{num_devices} stages x {replicas} replicas do not split over {slices} slices: make "
            f"`stages` (or else `data`) a multiple of {slices}",
        )
    along_stages = num_devices % slices == 0
    K, D = num_devices, replicas // slices
    if along_stages:
        K, D = num_devices // slices, replicas
    if hasattr(devices[0], "coords"):
        rows = _through_torus(devices, slices, K, D, along_stages)
    else:
        order = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
        rows = np.asarray(order).reshape(slices, K, D)
    if along_stages:
        return rows.reshape(num_devices, replicas)
    return np.concatenate(list(rows), axis=1)


def _through_torus(
    devices: Sequence[Any], slices: int, K: int, D: int, along_stages: bool
) -> np.ndarray:
    """Return [n, K, D]: slice after slice, with as few links between stages as possible."""
    best, least = None, (math.inf, math.inf)
    for shape in _factors(K):
        try:
            grid = _hybrid(devices, slices, (D, *shape), along_stages)
        except (ValueError, NotImplementedError, AssertionError):
            continue  # this shape does not divide the torus
        rows = np.stack([_snake(of_slice) for of_slice in grid])
        cost = max(hops(of_slice) for of_slice in rows)
        if cost < least:
            best, least = rows, cost
        if least[0] <= 1:
            break
    if best is None and slices > 1:
        raise ValueError(
            f"{K} stages x {D} replicas cannot be laid over {len(devices) // slices} devices of a "
            f"slice; use all devices of it"
        )
    if best is None:  # the devices are not a block of the torus
        return np.asarray(devices).reshape(1, K, D)
    return best


def _factors(number: int) -> Iterator[tuple[int, int, int]]:
    """Yield the ways to write a number as three factors, (1, 1, number) first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    for a in divisors:
        for b in divisors:
            if number % (a * b) == 0:
                yield a, b, number // (a * b)


def _hybrid(
    devices: Sequence[Any], slices: int, shape: tuple[int, ...], along_stages: bool
) -> np.ndarray:
    """Return the devices [n, a, b, c, D] for a shape (D, a, b, c) of a slice.

    Replicas come first: if both are along one axis of the torus, stages are then closer.
    """
    across = (1, slices, 1, 1) if along_stages else (slices, 1, 1, 1)
    options: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, **options)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(shape, across, devices, **options)
    grids = np.split(grid, slices, axis=1 if along_stages else 0)
    return np.stack([np.moveaxis(of_slice, 0, -1) for of_slice in grids])


def _snake(grid: np.ndarray) -> np.ndarray:
    """Return [a, b, c, D] as [a b c, D], back and forth: successive rows are neighbours."""
    planes = [plane if i % 2 == 0 else plane[::-1] for i, plane in enumerate(grid)]
    rows = [row if r % 2 == 0 else row[::-1] for r, row in enumerate(np.concatenate(planes))]
    return np.concatenate(rows)


def hops(grid: np.ndarray) -> tuple[float, float]:
    """Return (most, sum) of the links from each device to that of the next stage.

    The links that close a torus are ignored.
    """
    coords = np.asarray([[device.coords for device in row] for row in grid])
    distances = np.abs(np.diff(coords, axis=0)).sum(-1)
    return (float(distances.max()), float(distances.sum())) if distances.size else (0, 0)
