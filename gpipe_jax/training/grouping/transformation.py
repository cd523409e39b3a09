"""Make an optimizer for packed parameters from one for the layers' tree, such as with masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpipe_jax.distributed.mesh import MeshLike
from gpipe_jax.errors import ArgumentError
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.training.elementwise import REFUSED, AllZeroError, check_elementwise
from gpipe_jax.training.grouping.leaf_programs import Programs, UnlikeParametersError
from gpipe_jax.training.grouping.logical_tree import Ids, LogicalTree, layers_tree
from gpipe_jax.training.grouping.own_leaves import Traced, on_own_leaves
from gpipe_jax.training.grouping.owned_program import MixedError
from gpipe_jax.training.grouping.rules import programs_of
from gpipe_jax.training.grouping.state_form import GroupedState, StateForm
from gpipe_jax.utils.trees import PyTree, wide


def on_packed(
    tx: optax.GradientTransformation, storage: ChunkedStorage, mesh: MeshLike
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of packed parameters that does as `tx` on the layers' tree.

    An elementwise one is returned as it is. One that sees whole parameters gets the layers' own
    arrays.

    Args:
        tx: An optax transformation for a list of trees, one for each layer.
        storage: How the parameters are stored.
        mesh: The devices.

    Raises:
        ArgumentError: `tx` does not take such a list.
        ValueError: It mixes elements of several parameters, or its state has arrays of other shapes
            than the parameters.
    """
    extended = optax.with_extra_args_support(tx)
    if _is_elementwise(tx):
        _check_unmixed(extended, _FEW)
        return extended
    tree = layers_tree(storage)
    try:
        programs, groups = programs_of(extended, storage, mesh)
    except (ArgumentError, AllZeroError):
        raise
    except ValueError as error:  # packed parameters would not do: it sees whole ones
        try:
            return on_own_leaves(extended, storage, mesh)
        except (MixedError, UnlikeParametersError) as reason:
            raise ValueError(f"{error} ({reason})") from error
    _check_unmixed(extended, tree)
    gradients = jax.eval_shape(wide, tree)
    types = [a.dtype for a in jax.tree.leaves(gradients)]
    packed = _Packed(extended, LogicalTree(storage, mesh, groups), programs, groups, types)
    return optax.GradientTransformationExtraArgs(packed.init, packed.update)


def _is_elementwise(tx: optax.GradientTransformation) -> bool:
    try:
        check_elementwise(tx)
    except AllZeroError:
        raise
    except ValueError:
        return False
    return True


# Enough parameters to see whether they are mixed; a large network takes long to trace.
_FEW = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 3), (4,), (5, 6, 7))]


def _check_unmixed(tx: optax.GradientTransformationExtraArgs, tree: PyTree) -> None:
    """Raise ValueError if an optimizer mixes elements of several parameters.

    A trial on some arrays does not show this, if it takes the same element of them as of others.
    """
    try:
        Traced(tx, tree)
    except MixedError as error:
        raise ValueError(f"{REFUSED} ({error})") from error


class _Packed:
    """Apply an optimizer of the layers' tree to packed parameters."""

    def __init__(
        self,
        tx: Any,
        logical: LogicalTree,
        programs: Programs,
        groups: Sequence[int],
        types: Sequence[Any],  # of the gradient of each parameter
    ) -> None:
        self._tx, self._logical = tx, logical
        self._state = StateForm(programs.state, programs.shapes, groups, types)

    # --- the transformation ----------------------------------------------------------------------

    def init(self, params: PyTree) -> GroupedState:
        """Return the first state."""
        ids = self._logical.ids(params)
        return self._packed(self._tx.init(self._logical.present(params, ids)), params, ids)

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, GroupedState]:
        """Return the updates and the next state."""
        ids = self._logical.ids(updates)
        decaying = jax.tree.map(
            lambda d, a: jnp.broadcast_to(d, a.shape), extra.pop("decaying"), updates
        )
        presented = [self._logical.present(tree, ids) for tree in (updates, params, decaying)]
        before = self._state.unpack(state, lambda i, flat: self._logical.leaf(i, flat, ids))
        grads, params, decaying = presented
        new, after = self._tx.update(grads, before, params, decaying=decaying, **extra)
        specs = jax.tree.leaves(updates)
        leaves = dict(enumerate(jax.tree.leaves(new)))
        return self._logical.collect(leaves, ids, specs), self._packed(after, updates, ids)

    def _packed(self, state: PyTree, gradients: PyTree, ids: Ids) -> GroupedState:
        def collect(leaves: Mapping[int, jax.Array], like: Sequence[Any]) -> PyTree:
            return self._logical.collect(leaves, ids, like)

        return self._state.pack(jax.tree.leaves(state), gradients, collect)
