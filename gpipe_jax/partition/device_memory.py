"""Choose a cut in which all stages of a device fit in its memory, if a device has several.

Letters: K devices, V chunks, K V stages; device k holds the stages k, k + K, k + 2 K and so on.
"""

from collections.abc import Callable, Sequence

from gpipe_jax.errors import ArgumentError
from gpipe_jax.partition.solver import Partition

_HALVINGS = 16  # of the interval of bounds


def of_devices(
    cut: Partition, held: Sequence[float], in_use: Sequence[float], chunks: int
) -> list[float]:
    """Return the bytes that each device needs for its layers.

    Args:
        cut: The cut into K V stages.
        held: The bytes of each layer that a device holds all the time: parameters and the like.
        in_use: The bytes of each layer that a device holds while it computes the layer's stage.
        chunks: V.

    Returns:
        What all stages of device k hold, and the largest of them uses, [K].
    """
    held_S, in_use_S = (
        [sum(values[i] for i in layers) for layers in cut.layer_ranges] for values in (held, in_use)
    )
    K = len(held_S) // chunks
    return [sum(held_S[k::K]) + max(in_use_S[k::K]) for k in range(K)]


def fit(
    best_cut: Callable[[float], Partition],
    need: Callable[[Partition], float],
    limit: float,
    chunks: int,
) -> Partition:
    """Return the best cut in which the stages of each device fit together.

    It is the best cut of stages that fit alone, if those of a device then fit together. If not, the
    stages get a tighter bound, which is found by halving: the loosest one whose best cut fits.

    Args:
        best_cut: Function (bytes that a stage may need) -> best cut; raises ArgumentError if there
            is none.
        need: Function (cut) -> bytes that the largest device needs.
        limit: The bytes of a device.
        chunks: V.

    Returns:
        The cut. If none was found that fits, it is the one that needs least.

    Raises:
        ArgumentError: There is no cut of stages that fit alone.
    """
    least, fitting = best_cut(limit), None
    if chunks == 1 or need(least) <= limit:
        return least
    bound, low, high = limit / chunks, 0.0, limit
    for _ in range(_HALVINGS):
        try:
            cut = best_cut(bound)
        except ArgumentError:  # no stages are so small
            low = bound
        else:
            least = min(least, cut, key=need)
            if need(cut) <= limit:
                fitting, low = cut, bound
            else:
                high = bound
        bound = (low + high) / 2
    return fitting or least
