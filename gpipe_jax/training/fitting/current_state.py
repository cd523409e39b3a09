"""Check that a trainer can go on from a training state."""

from typing import Any

import jax
import numpy as np

from gpipe_jax.errors import ArgumentError
from gpipe_jax.pipeline.state import (
    TrainArrays,
    TrainState,
    is_given_up,
    layout_difference,
)
from gpipe_jax.utils.trees import PyTree


def check(current: Any, expected: TrainArrays) -> None:
    """Raise ArgumentError unless a trainer can use `current`; `expected` has its shapes."""
    if not isinstance(current, TrainState):
        problem = (
            f"must be a TrainState, got {type(current).__name__}; give what `trainer.init(seed)` "
            f"or `trainer.start(state)` returns"
        )
    elif is_given_up(current.arrays):
        problem = (
            "has been updated in place by an earlier step, so it cannot be used again; give the "
            "state which that step or `fit` returned, or `trainer.reached` after an error"
        )
    elif difference := _difference(current, expected):
        problem = f"is of another trainer: {difference}"
    else:
        return
    raise ArgumentError("current", f"`current` {problem}")


def _difference(current: TrainState, expected: TrainArrays) -> str | None:
    """Return what differs from a trainer's own states, and the remedy; None if nothing does."""
    anew = "with trainer.start(current.state, current.step)"
    if layout := layout_difference(current.state, expected.state):
        return (
            f"{layout}; take its layers over with trainer.from_layers(other.to_layers(current), "
            f"current.step), or save and load it"
        )
    if _forms(current.opt_state) != _forms(expected.opt_state):
        return f"the optimizer (`tx`) differs; give the same one, or start this one anew {anew}"
    if _forms(current.average) == _forms(expected.average):
        return None
    if expected.average is None:
        return (
            "it has a moving average, and this one has no `ema`; give the same `ema`, or drop the "
            "average with current._replace(average=None)"
        )
    return (
        f"it has no moving average as `ema` needs it; leave `ema` out, or start average and "
        f"optimizer anew {anew}"
    )


def _forms(tree: PyTree) -> tuple:
    """Return the structure and the shapes; users may replace a learning rate by a number."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(a) for a in leaves]
