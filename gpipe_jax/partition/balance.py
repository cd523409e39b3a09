"""Where a network is cut into stages: `partition`, told what the layers of a pipeline cost."""

from collections.abc import Sequence

from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.partition import solver
from gpipe_jax.partition.costs import LayerCost


def cut(
    wanted: str | Sequence[int],
    costs: Sequence[LayerCost],
    shapes: Sequence[LayerShape],
    *,
    stages: int,
    transfer: Sequence[float] | None,
    kept_bytes: Sequence[int],
    memory_limit: float | None,
) -> solver.Partition:
    """The `wanted` stages: "auto", or the first layer of each but the first.

    `transfer` is what a cut behind each layer adds, in the unit of the costs.
    """
    if isinstance(wanted, str) and wanted != "auto":
        raise ValueError(
            f"`partition` must be 'auto' or the first layer of stages 1 to {stages - 1}, "
            f"got {wanted!r}"
        )
    times = [c.compute_s for c in costs]
    options: dict = dict(
        transfer=transfer,
        # Value, gradient and two optimizer slots for each parameter.
        memory=[4 * c.parameter_bytes + kept for c, kept in zip(costs, kept_bytes, strict=True)],
        memory_limit=memory_limit,
        names=[str(shape.layer) for shape in shapes],
    )
    if not isinstance(wanted, str):
        return solver.explicit(wanted, times, stages=stages, **options)
    padding = [c.parameter_bytes for c in costs]
    return solver.partition(times, stages, padding=padding, **options)
