"""Detect divergence: a loss, or the state after an update, is not finite."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.checkpoint.by_layer import LayerTrees, not_finite
from gpipe_jax.distributed.mesh import MeshLike, replicated_sharding
from gpipe_jax.errors import DivergedError
from gpipe_jax.pipeline.state import TrainArrays
from gpipe_jax.utils.trees import float_leaves

REMEDY = (
    "try a lower optimizer.learning_rate, more optimizer.warmup_steps, or optimizer.clip_norm=1"
)


def all_finite(arrays: TrainArrays) -> jax.Array:
    """Return whether every array is finite, padding included, as one bool []."""
    # Training changes nothing in `fixed`: a mask of attention is infinite.
    arrays = arrays._replace(state=arrays.state._replace(fixed=None))
    # Scalars are left out: an optimizer may begin with an infinite "best loss so far".
    leaves = [a for a in float_leaves(arrays) if a.ndim]
    return jnp.all(jnp.asarray([jnp.isfinite(a).all() for a in leaves], bool))


class Divergence:
    """Check losses and training states; errors give the last finite loss.

    A separate program checks the arrays, so that no step becomes slower. All processes get the same
    answer, and must call it together.
    """

    def __init__(self, mesh: MeshLike) -> None:
        self.last_loss = math.nan  # of the newest finished step
        self._all_finite = jax.jit(all_finite, out_shardings=replicated_sharding(mesh))

    def check_loss(self, name: str, step: int, value: float) -> None:
        """Raise DivergedError unless a loss is finite."""
        if not math.isfinite(value):
            raise DivergedError(
                f"the {name} became {value} at step {step} ({self._last()}); {REMEDY}; "
                f"a label outside the network's classes makes it NaN too"
            )

    def is_finite(self, arrays: TrainArrays) -> bool:
        """Return whether a training state, padding included, holds neither NaN nor infinity."""
        return bool(self._all_finite(arrays))

    def error(self, since: int, step: int, own_layers: LayerTrees) -> DivergedError:
        """Return the error of a state that is not finite, although all losses are.

        Args:
            since: The last step whose state was finite, or with which the training began.
            step: The step of the state.
            own_layers: The layers of this process, to name one of the arrays.
        """
        when = f"in step {step}" if step == since + 1 else f"in one of steps {since + 1} to {step}"
        return DivergedError(
            f"{_name(own_layers)} became NaN or infinite {when}, though each loss was finite "
            f"({self._last()}): a gradient was not. The state after step {step} is not saved; "
            f"earlier checkpoints are unchanged; {REMEDY}"
        )

    def _last(self) -> str:
        if math.isnan(self.last_loss):
            return "there was no step before it"
        return f"the last finite loss was {self.last_loss:.6g}"


def _name(own_layers: LayerTrees) -> str:
    layers: dict[Any, Any] = dict(own_layers.layers)
    found = (f"layer {i}, {name}," for i, tree in layers.items() for name in not_finite(tree))
    return next(found, "an array of another host's layers")
