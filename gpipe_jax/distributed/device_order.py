"""Which device does which stage: neighbours in the pipeline are neighbours on the interconnect.

Letters: K stages, D replicas, n slices.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def arrange(devices: Sequence[Any], stages: int, data: int) -> np.ndarray:
    """K x D of the devices, which must be as many.

    Slices of TPUs, between which only the data-centre network is, follow each other along the
    stages, for only boundary activations cross from stage to stage; along the replicas only if the
    stages do not split over them. Within a slice the stages go back and forth through the torus.
    Raises ValueError if neither splits, or the devices of several slices are no blocks of them.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if stages % slices and data % slices:
        raise ValueError(
            f"{stages} stages x {data} replicas do not split over {slices} slices: make `stages` "
            f"(or else `data`) a multiple of {slices}"
        )
    along_stages = stages % slices == 0
    K, D = (stages // slices, data) if along_stages else (stages, data // slices)
    if hasattr(devices[0], "coords"):
        rows = _through_torus(devices, slices, K, D, along_stages)
    else:
        order = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
        rows = np.asarray(order).reshape(slices, K, D)
    return rows.reshape(stages, data) if along_stages else np.concatenate(list(rows), axis=1)


def _through_torus(
    devices: Sequence[Any], slices: int, K: int, D: int, along_stages: bool
) -> np.ndarray:
    """[n, K, D]: one slice after the other, each with as few links between stages as is found."""
    best, least = None, (math.inf, math.inf)
    for shape in _factors(K):
        try:
            grid = _hybrid(devices, slices, (D, *shape), along_stages)
        except (ValueError, NotImplementedError, AssertionError):
            continue  # not a way to cut this torus
        rows = np.stack([_snake(one) for one in grid])
        cost = max(hops(one) for one in rows)
        if cost < least:
            best, least = rows, cost
        if least[0] <= 1:
            break
    if best is None and slices > 1:
        raise ValueError(
            f"{K} stages x {D} replicas cannot be laid over {len(devices) // slices} devices of a "
            f"slice; use all devices of it"
        )
    return np.asarray(devices).reshape(1, K, D) if best is None else best  # no block of it


def _factors(number: int) -> Iterator[tuple[int, int, int]]:
    """The ways to write a number as three factors, that of one factor first."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    for a in divisors:
        for b in divisors:
            if number % (a * b) == 0:
                yield a, b, number // (a * b)


def _hybrid(
    devices: Sequence[Any], slices: int, shape: tuple[int, ...], along_stages: bool
) -> np.ndarray:
    """[n, a, b, c, D] of the devices for a shape (D, a, b, c) of a slice.

    Replicas come first, so that where both are along an axis of the torus the stages are close.
    """
    across = (1, slices, 1, 1) if along_stages else (slices, 1, 1, 1)
    options: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, **options)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(shape, across, devices, **options)
    parts = np.split(grid, slices, axis=1 if along_stages else 0)
    return np.stack([np.moveaxis(part, 0, -1) for part in parts])


def _snake(grid: np.ndarray) -> np.ndarray:
    """[a, b, c, D] as [a b c, D], back and forth: every row follows a neighbour of its."""
    planes = [plane if i % 2 == 0 else plane[::-1] for i, plane in enumerate(grid)]
    rows = [row if r % 2 == 0 else row[::-1] for r, row in enumerate(np.concatenate(planes))]
    return np.concatenate(rows)


def hops(grid: np.ndarray) -> tuple[float, float]:
    """(most, sum) of the links from each device to that of the next stage.

    Links that close a torus are not counted on.
    """
    coords = np.asarray([[device.coords for device in row] for row in grid])
    distances = np.abs(np.diff(coords, axis=0)).sum(-1)
    return (float(distances.max()), float(distances.sum())) if distances.size else (0, 0)
