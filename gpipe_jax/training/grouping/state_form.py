"""Store an optimizer's state: arrays of the parameters in their form, and what belongs to none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gpipe_jax.training.grouping.leaf_programs import StateLeaf
from gpipe_jax.utils.trees import PyTree


class GroupedState(NamedTuple):
    """Hold an optimizer's state.

    Trees of the optimizer that belong to different parameters, such as the moments of two groups,
    share one tree here. So there is one number for each parameter, not one for each group.
    """

    trees: tuple[PyTree, ...]  # in the form of the parameters
    common: dict[str, jax.Array]  # what belongs to no parameter, by number


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


class StateForm:
    """Convert between the state of an optimizer for the layers' tree and a `GroupedState`.

    Args:
        leaves: What each array of the optimizer's state belongs to.
        shapes: The shapes of that state.
        groups: The group of each parameter; trees that have no group in common share one.
        types: The type of the gradient of each parameter.
    """

    def __init__(
        self,
        leaves: Sequence[StateLeaf],
        shapes: PyTree,
        groups: Sequence[int],
        types: Sequence[Any],
    ) -> None:
        self._leaves, self._structure = leaves, jax.tree.structure(shapes)
        trees: dict[str, _Shared] = {}
        for (tree, i), array in zip(leaves, jax.tree.leaves(shapes), strict=True):
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

    def pack(self, arrays: Sequence[Any], gradients: PyTree, collect: Callable) -> GroupedState:
        """Return the state from its arrays.

        Args:
            arrays: The arrays of the optimizer's state, in order.
            gradients: Arrays or shapes in the form of the parameters.
            collect: A function ({parameter: array}, shapes) -> arrays in that form.
        """
        leaves: list[dict[int, jax.Array]] = [{} for _ in self._shared]
        common = {}
        for (tree, i), array in zip(self._leaves, arrays, strict=True):
            if tree:
                leaves[self._place[tree]][i] = array
            else:
                common[str(i)] = array
        trees = [
            collect(own, _like(gradients, shared.dtypes))
            for own, shared in zip(leaves, self._shared, strict=True)
        ]
        return GroupedState(tuple(trees), common)

    def arrays(self, state: GroupedState, leaf: Callable) -> list[Any]:
        """Invert `pack`; `leaf(i, arrays)` takes parameter i out of a flat list in their form."""
        trees = [jax.tree.leaves(tree) for tree in state.trees]
        return [
            leaf(i, trees[self._place[tree]]) if tree else state.common[str(i)]
            for tree, i in self._leaves
        ]

    def unpack(self, state: GroupedState, leaf: Callable) -> PyTree:
        """Return the state of the optimizer, of such leaves."""
        return self._structure.unflatten(self.arrays(state, leaf))


def _like(gradients: PyTree, dtypes: Mapping[Any, Any]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the gradients' arrays, with other types."""
    return [
        jax.ShapeDtypeStruct(a.shape, dtypes.get(a.dtype, a.dtype))
        for a in jax.tree.leaves(gradients)
    ]
