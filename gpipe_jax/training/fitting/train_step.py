"""Define the compiled training step: gradients, the optimizer's update and the moving average."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gpipe_jax.distributed.mesh import params_sharding, replicated_sharding
from gpipe_jax.pipeline import spmd
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.state import TrainArrays, TrainState
from gpipe_jax.training.elementwise import check_transformation
from gpipe_jax.training.fitting import current_state
from gpipe_jax.training.grouping.transformation import on_packed
from gpipe_jax.training.optimizers import decays, map_parameters, moving_average
from gpipe_jax.utils.trees import PyTree, wide


class Updated(NamedTuple):
    """Hold what the optimizer's update replaces, or its shapes."""

    opt_state: PyTree
    average: PyTree  # moving average of the parameters; None without one
    params: PyTree


class StepArguments(NamedTuple):
    """Hold the arguments of the compiled step, or their shapes and shardings."""

    arrays: TrainArrays  # updated in place
    micro_batched: dict  # see `Pipeline.split`
    step: Any  # updates done before, uint32 []


class TrainStep:
    """Compile the training step of a pipeline with an optimizer.

    Args:
        pipe: The pipeline.
        tx: An optax transformation; see `Trainer`.
        ema: Decay of the moving average of the parameters, or None.

    Attributes:
        tx: The optax transformation, for packed parameters.
        program: The jitted step, whose arguments are `StepArguments`.
    """

    def __init__(self, pipe: Pipeline, tx: optax.GradientTransformation, ema: float | None) -> None:
        self._pipe, self._ema = pipe, ema
        check_transformation("tx", tx)
        self.tx = on_packed(tx, pipe.stages.params, pipe.mesh)
        # Everything is updated in place and stays where it is. A result with another sharding (on
        # a mesh of one device) would compile the second step again.
        outputs = (self.shardings, None)
        self.program = jax.jit(self._update, donate_argnums=0, out_shardings=outputs)

    # --- the arrays ------------------------------------------------------------------------------

    def begin(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Return the optimizer's first state, and the first average, on the devices."""
        places = self.shardings
        return jax.jit(self._begin, out_shardings=(places.opt_state, places.average))(params)

    def _begin(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Return optimizer state and average, in the gradients' types: float32 at least."""
        params = wide(params)
        return self.tx.init(params), None if self._ema is None else params

    @functools.cached_property
    def local_shapes(self) -> TrainArrays:
        """Return the shapes of the arrays that one device holds."""
        state = states.local_shapes(self._pipe.stages)
        return TrainArrays(state, *jax.eval_shape(self._begin, state.params))

    @functools.cached_property
    def shardings(self) -> TrainArrays:
        """Return the shardings of the arrays.

        Arrays in the form of the parameters have their sharding. Every device has a copy of the
        rest.
        """
        mesh, local = self._pipe.mesh, self.local_shapes
        sharded, replicated = params_sharding(mesh), replicated_sharding(mesh)

        def like_params(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda _: sharded, tree)

        def place(tree: PyTree) -> PyTree:
            placed = map_parameters(like_params, tree, local.state.params)
            return jax.tree.map(lambda a: sharded if a is sharded else replicated, placed)

        state = states.shardings(self._pipe.stages, mesh)
        return TrainArrays(state, place(local.opt_state), place(local.average))

    # --- the step --------------------------------------------------------------------------------

    def run(
        self, arrays: TrainArrays, micro_batched: dict, step: int
    ) -> tuple[TrainArrays, dict[str, jax.Array]]:
        """Do one update: return the new arrays, and the loss and the metrics by name."""
        return self.program(arrays, micro_batched, np.uint32(step))

    def _update(
        self, arrays: TrainArrays, micro_batched: dict, step: jax.Array
    ) -> tuple[TrainArrays, dict[str, jax.Array]]:
        """Compute the whole training step, traced."""
        state, opt_state, average = arrays
        (loss, metrics), grads, stats = self._pipe.gradients(state, micro_batched, step)
        decaying = spmd.mask_parameters(self._pipe.stages, self._pipe.mesh, decays)
        before = Updated(opt_state, average, state.params)
        after = self.apply_gradients(before, grads, step, decaying)
        state = state._replace(params=after.params, stats=stats)
        return TrainArrays(state, after.opt_state, after.average), {"loss": loss, **metrics}

    def apply_gradients(
        self, before: Updated, grads: PyTree, step: jax.Array, decaying: PyTree
    ) -> Updated:
        """Apply an update of the optimizer, within a traced function.

        Args:
            before: The optimizer's state, the moving average and the parameters.
            grads: The gradients, in the form of the parameters.
            step: Number of updates done so far.
            decaying: Which parameters decay, in the form of the parameters.

        Returns:
            The same after the update.
        """
        updates, opt_state = self.tx.update(
            grads, before.opt_state, before.params, decaying=decaying
        )
        params, average = optax.apply_updates(before.params, updates), before.average
        if self._ema is not None:
            average = moving_average(average, params, step, self._ema)
        return Updated(opt_state, average, params)

    # --- from shapes alone -----------------------------------------------------------------------

    def local_update_arguments(self) -> tuple[Updated, PyTree]:
        """Return the shapes on one device of what an update replaces, and of the gradients."""
        state, opt_state, average = self.local_shapes
        return Updated(opt_state, average, state.params), jax.eval_shape(wide, state.params)

    def abstract_arguments(self) -> StepArguments:
        """Return the shapes and shardings of the step's arguments."""
        _, micro_batched, step = self._pipe.abstract_arguments()
        return StepArguments(self.abstract, micro_batched, step)

    @functools.cached_property
    def abstract(self) -> TrainArrays:
        """Return the shapes and shardings of the arrays."""
        state = self._pipe.abstract_arguments().state
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            TrainArrays(state, *jax.eval_shape(self._begin, state.params)),
            self.shardings,
        )

    def check(self, current: TrainState) -> None:
        """Raise ArgumentError unless a step can go on from `current`."""
        current_state.check(current, self.abstract)
