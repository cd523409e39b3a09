"""Choose the stage boundaries of a pipeline from the costs of its layers."""

from collections.abc import Sequence

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.partition import device_memory, solver
from gpipe_jax.partition.costs import LayerCost


def cut(
    boundaries: str | Sequence[int],
    costs: Sequence[LayerCost],
    shapes: Sequence[LayerShape],
    *,
    stages: int,
    chunks: int,
    transfer: Sequence[float] | None,
    kept_bytes: Sequence[int],
    memory_limit: float | None,
) -> solver.Partition:
    """Return the cut into stages.

    Args:
        boundaries: "auto", or the first layer of each stage but the first.
        costs: The cost of each layer.
        shapes: The shapes of each layer, for its name.
        stages: The number of stages.
        chunks: The number of stages on each device.
        transfer: What a cut after each layer adds, in the unit of the costs.
        kept_bytes: What a stage stores for the backward pass of each layer (see `pipeline.remat`).
        memory_limit: Bytes that a device may hold in all its stages, or None.
    """
    if isinstance(boundaries, str) and boundaries != "auto":
        raise ArgumentError(
            "partition",
            f"`partition` must be 'auto' or the first layer of stages 1 to {stages - 1}, "
            f"got {boundaries!r}",
        )
    times = [c.compute_s for c in costs]
    # Of a trained parameter: value, gradient, two optimizer slots.
    held = [4 * c.parameter_bytes + c.fixed_bytes for c in costs]
    options: dict = dict(
        transfer=transfer,
        memory=[own + kept for own, kept in zip(held, kept_bytes, strict=True)],
        names=[str(shape.layer) for shape in shapes],
    )
    if not isinstance(boundaries, str):
        options["memory_limit"] = memory_limit
        return solver.explicit(boundaries, times, stages=stages, **options)

    def best_cut(limit: float | None) -> solver.Partition:
        padding = [c.parameter_bytes + c.fixed_bytes for c in costs]
        return solver.partition(times, stages, padding=padding, memory_limit=limit, **options)

    def need(cut: solver.Partition) -> float:
        return max(device_memory.of_devices(cut, held, kept_bytes, chunks))

    if memory_limit is None:
        return best_cut(None)
    return device_memory.fit(best_cut, need, memory_limit, chunks)
