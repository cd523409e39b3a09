"""Make an optimizer for packed parameters from one for the layers' tree, such as with masks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpipe_jax.distributed.mesh import MeshLike
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.training.elementwise import AllZeroError, check_elementwise
from gpipe_jax.training.grouping.leaf_programs import Programs
from gpipe_jax.training.grouping.logical_tree import Ids, LogicalTree, layers_tree
from gpipe_jax.training.grouping.rules import programs_of
from gpipe_jax.utils.trees import PyTree, wide


class GroupedState(NamedTuple):
    """Hold an optimizer's state.

    Trees of the optimizer that belong to different parameters, such as the moments of two groups,
    share one tree here. So there is one number for each parameter, not one for each group.
    """

    trees: tuple[PyTree, ...]  # in the form of the parameters
    common: dict[str, jax.Array]  # what belongs to no parameter, by number


def on_packed(
    tx: optax.GradientTransformation, storage: ChunkedStorage, mesh: MeshLike
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of packed parameters that does as `tx` on the layers' tree.

    An elementwise one is returned as it is.

    Args:
        tx: An optax transformation for a list of trees, one for each layer.
        storage: How the parameters are stored.
        mesh: The devices.

    Raises:
        ArgumentError: `tx` does not take such a list, or distinguishes parameters by size.
        ValueError: It mixes elements of parameters.
    """
    extended = optax.with_extra_args_support(tx)
    if _is_elementwise(tx):
        return extended
    programs, groups = programs_of(extended, storage, mesh)
    gradients = jax.eval_shape(wide, layers_tree(storage))
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


class _Shared(NamedTuple):
    """Describe a tree that several trees of an optimizer share."""

    groups: set[int]  # which have a part of it
    dtypes: dict[Any, Any]  # the type of its arrays, by the type of the gradients

    def has_room(self, other: "_Shared") -> bool:
        """Return whether another one fits in."""
        both = self.dtypes.keys() & other.dtypes.keys()
        return not self.groups & other.groups and all(
            self.dtypes[dtype] == other.dtypes[dtype] for dtype in both
        )

    def add(self, other: "_Shared") -> None:
        """Take another one in."""
        self.groups.update(other.groups)
        self.dtypes.update(other.dtypes)


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
        self._leaves, self._structure = programs.state, jax.tree.structure(programs.shapes)
        trees: dict[str, _Shared] = {}
        arrays = zip(self._leaves, jax.tree.leaves(programs.shapes), strict=True)
        for (tree, i), array in arrays:
            if tree:
                part = trees.setdefault(tree, _Shared(set(), {}))
                part.add(_Shared({groups[i]}, {types[i]: array.dtype}))
        self._shared: list[_Shared] = []
        self._place = {tree: self._share(part) for tree, part in trees.items()}

    def _share(self, part: _Shared) -> int:
        """Return the number of the shared tree that takes a tree of the optimizer in."""
        for n, shared in enumerate(self._shared):
            if shared.has_room(part):
                shared.add(part)
                return n
        self._shared.append(part)
        return len(self._shared) - 1

    # --- the transformation ----------------------------------------------------------------------

    def init(self, params: PyTree) -> GroupedState:
        """Return the first state."""
        ids = self._logical.ids(params)
        return self._pack(self._tx.init(self._logical.present(params, ids)), params, ids)

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, GroupedState]:
        """Return the updates and the next state."""
        ids = self._logical.ids(updates)
        decaying = jax.tree.map(
            lambda d, a: jnp.broadcast_to(d, a.shape), extra.pop("decaying"), updates
        )
        presented = [self._logical.present(tree, ids) for tree in (updates, params, decaying)]
        before = self._unpack(state, ids)
        grads, params, decaying = presented
        new, after = self._tx.update(grads, before, params, decaying=decaying, **extra)
        specs = jax.tree.leaves(updates)
        leaves = dict(enumerate(jax.tree.leaves(new)))
        return self._logical.collect(leaves, ids, specs), self._pack(after, updates, ids)

    # --- the state -------------------------------------------------------------------------------

    def _pack(self, state: PyTree, gradients: PyTree, ids: Ids) -> GroupedState:
        leaves: list[dict[int, jax.Array]] = [{} for _ in self._shared]
        common = {}
        for (tree, i), array in zip(self._leaves, jax.tree.leaves(state), strict=True):
            if tree:
                leaves[self._place[tree]][i] = array
            else:
                common[str(i)] = array
        trees = [
            self._logical.collect(own, ids, _like(gradients, shared.dtypes))
            for own, shared in zip(leaves, self._shared, strict=True)
        ]
        return GroupedState(tuple(trees), common)

    def _unpack(self, state: GroupedState, ids: Ids) -> PyTree:
        trees = [jax.tree.leaves(tree) for tree in state.trees]
        leaves = [
            self._logical.leaf(i, trees[self._place[tree]], ids) if tree else state.common[str(i)]
            for tree, i in self._leaves
        ]
        return self._structure.unflatten(leaves)


def _like(gradients: PyTree, dtypes: Mapping[Any, Any]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the gradients' arrays, with other types."""
    return [
        jax.ShapeDtypeStruct(a.shape, dtypes.get(a.dtype, a.dtype))
        for a in jax.tree.leaves(gradients)
    ]
