"""Apply an optimizer that sees whole parameters, such as LAMB or Muon, to the layers' own arrays.

Each device takes the parameters that it stores out of the packed arrays, updates them, and puts
them back. It computes nothing for those of other devices. Scalars that several parameters make,
such as a global norm, are exchanged; see `owned_program`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gpipe_jax.distributed.mesh import (
    PARAMS_SPEC,
    REPLICATED_SPEC,
    MeshLike,
    device_index,
    num_devices,
    sum_over_stages,
)
from gpipe_jax.pipeline import spmd
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.storage import from_block, to_block
from gpipe_jax.training.grouping.leaf_programs import state_leaves
from gpipe_jax.training.grouping.logical_tree import homes, layers_tree
from gpipe_jax.training.grouping.owned_program import MixedError, OwnedProgram
from gpipe_jax.training.grouping.state_form import GroupedState, StateForm
from gpipe_jax.utils.trees import PyTree, wide


def on_own_leaves(
    tx: optax.GradientTransformationExtraArgs, storage: ChunkedStorage, mesh: MeshLike
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of packed parameters that applies `tx` to the layers' own arrays.

    Raises:
        MixedError: It mixes elements of several parameters.
        UnlikeParametersError: Its state has arrays of other shapes than the parameters.
    """
    own = _OnOwnLeaves(tx, storage, mesh)
    return optax.GradientTransformationExtraArgs(own.init, own.update)


class Traced:
    """Hold the traced programs of an optimizer for the layers' tree, with the owners of all values.

    Raises:
        MixedError: It mixes elements of several parameters.
        UnlikeParametersError: Its state has arrays of other shapes than the parameters.
    """

    def __init__(self, tx: Any, tree: PyTree) -> None:
        gradients = jax.eval_shape(wide, tree)
        decaying = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, bool), tree)
        init, shapes = jax.make_jaxpr(tx.init, return_shape=True)(gradients)

        def update(gradients: PyTree, params: PyTree, decaying: PyTree, state: PyTree) -> tuple:
            return tx.update(gradients, state, params, decaying=decaying)

        leaves, everyone = state_leaves(shapes, tree), list(range(len(jax.tree.leaves(tree))))
        of_state = [a.leaf if a.tree else None for a in leaves]
        program = jax.make_jaxpr(update)(gradients, tree, decaying, shapes)
        self.init = OwnedProgram(init, everyone)
        self.update = OwnedProgram(program, [*everyone, *everyone, *everyone, *of_state])
        _check_owners(self.init.owners, of_state)
        _check_owners(self.update.owners, [*everyone, *of_state])
        types = [a.dtype for a in jax.tree.leaves(gradients)]
        self.state = StateForm(leaves, shapes, everyone, types)


class _OnOwnLeaves:
    """Apply an optimizer of the layers' tree, each device to its own leaves."""

    def __init__(self, tx: Any, storage: ChunkedStorage, mesh: MeshLike) -> None:
        self._mesh, self._homes = mesh, jax.tree.leaves(homes(storage))
        self._local = storage.local_shapes()
        traced = Traced(tx, layers_tree(storage))
        if traced.update.shares_in_branches:
            raise MixedError("a conditional takes scalars of several parameters")
        self._first, self._update, self._state = traced.init, traced.update, traced.state

    # --- the transformation -----------------------------------------------------------------------

    def init(self, params: PyTree) -> GroupedState:
        """Return the first state."""

        def inputs(device: int, trees: Sequence[PyTree], common: Mapping) -> list:
            del common  # there is no state yet
            return self._leaves(device, trees[0])

        return self._run(_Task(self._first, inputs, self._pack), [params], {})

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, GroupedState]:
        """Return the updates and the next state."""
        decaying = jax.tree.map(
            lambda d, a: jnp.broadcast_to(jnp.asarray(d) != 0, a.shape), extra["decaying"], updates
        )

        def inputs(device: int, trees: Sequence[PyTree], common: Mapping) -> list:
            before = GroupedState(tuple(trees[3:]), dict(common))
            of_state = self._state.arrays(before, functools.partial(self._leaf, device))
            own = [leaf for tree in trees[:3] for leaf in self._leaves(device, tree)]
            return own + of_state

        def result(device: int, outputs: list, like: PyTree) -> tuple[PyTree, GroupedState]:
            count = len(self._homes)
            new = self._collect(device, dict(enumerate(outputs[:count])), jax.tree.leaves(like))
            return new, self._pack(device, outputs[count:], like)

        trees = [updates, params, decaying, *state.trees]
        return self._run(_Task(self._update, inputs, result), trees, state.common)

    def _run(self, task: "_Task", trees: list[PyTree], common: Mapping[str, jax.Array]) -> Any:
        """Run a task on every device; or on one, if the arrays are those of one device."""
        own = [
            {i for i, home in enumerate(self._homes) if home.device == k}
            for k in range(num_devices(self._mesh))
        ]
        if _shapes(trees[0]) == _shapes(self._local):  # of the first device, to measure the update
            return task.last(0, own[0], {}, trees, common)

        def body(trees: list[PyTree], common: Mapping[str, jax.Array]) -> Any:
            local = [[from_block(chunk) for chunk in tree] for tree in trees]
            known: dict[int, jax.Array] = {}
            for level in range(task.program.levels):
                found = _switch(
                    [
                        functools.partial(task.scalars, k, mine, level, known, local, common)
                        for k, mine in enumerate(own)
                    ]
                )
                known |= {n: _sum(a) for n, a in found.items()}

            def last(k: int) -> Any:
                return _to_blocks(task.last(k, own[k], known, local, common))

            result = _switch([functools.partial(last, k) for k in range(len(own))])
            # XLA fails if the body of a `shard_map` uses none of its arguments: a first state.
            return lax.optimization_barrier((result, trees))[0]

        first = GroupedState(PARAMS_SPEC, REPLICATED_SPEC)  # type: ignore[arg-type]
        out_specs = first if task.program is self._first else (PARAMS_SPEC, first)
        in_specs = (PARAMS_SPEC, REPLICATED_SPEC)
        return spmd.on_every_device(body, self._mesh, in_specs, out_specs)(trees, dict(common))

    # --- the leaves of one device -----------------------------------------------------------------

    def _leaves(self, device: int, tree: PyTree) -> list[jax.Array | None]:
        flat = jax.tree.leaves(tree)
        return [self._leaf(device, i, flat) for i in range(len(self._homes))]

    def _leaf(self, device: int, i: int, arrays: Sequence[jax.Array]) -> Any:
        """Return parameter i out of a device's arrays; None if another device has it."""
        home = self._homes[i]
        if home.device != device:
            return None
        array = arrays[home.array]
        if home.place.slot is not None:
            return array[home.row].reshape(home.spec.shape)
        return array[home.start : home.start + home.place.size].reshape(home.spec.shape)

    def _collect(self, device: int, leaves: Mapping[int, Any], like: Sequence[Any]) -> PyTree:
        """Return a device's arrays with these parameters in them, and zeros elsewhere."""
        arrays = [jnp.zeros(spec.shape, spec.dtype) for spec in like]
        for i, leaf in leaves.items():
            home = self._homes[i]
            if home.device != device:
                continue
            array = arrays[home.array]
            if home.place.slot is not None:
                arrays[home.array] = array.at[home.row].set(leaf.reshape(array.shape[1:]))
            else:
                end = home.start + home.place.size
                arrays[home.array] = array.at[home.start : end].set(leaf.reshape(-1))
        return jax.tree.structure(self._local).unflatten(arrays)

    def _pack(self, device: int, outputs: Sequence[Any], like: PyTree) -> GroupedState:
        return self._state.pack(outputs, like, functools.partial(self._collect, device))


class _Task(NamedTuple):
    """Hold a program, how a device makes its inputs, and what it makes of the outputs."""

    program: OwnedProgram
    inputs: Callable  # (device, trees, common) -> inputs
    result: Callable  # (device, outputs, arrays in the form of the result) -> result

    def scalars(
        self, device: int, own: set[int], level: int, known: dict, trees: list, common: Mapping
    ) -> dict[int, jax.Array]:
        """Return the scalars of a level, which all devices add up."""
        inputs = self.inputs(device, trees, common)
        return self.program.scalars(level, own, known, inputs)

    def last(self, device: int, own: set[int], known: dict, trees: list, common: Mapping) -> PyTree:
        """Return the result, from the scalars of all levels."""
        outputs = self.program.outputs(own, known, self.inputs(device, trees, common))
        return self.result(device, outputs, trees[0])


def _check_owners(found: Sequence[int | None], expected: Sequence[int | None]) -> None:
    """Raise MixedError if an output comes from another parameter than its own."""
    for owner, own in zip(found, expected, strict=True):
        if owner not in (None, own):
            raise MixedError("an array of one parameter comes from another one")


def _switch(branches: Sequence[Callable[[], Any]]) -> Any:
    return branches[0]() if len(branches) == 1 else lax.switch(device_index(), branches)


def _sum(scalar: jax.Array) -> jax.Array:
    """Add a scalar over the devices, of which one has it."""
    if scalar.dtype == bool:
        return sum_over_stages(scalar.astype(jnp.int32)) > 0
    return sum_over_stages(scalar)


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return [a.shape for a in jax.tree.leaves(tree)]


def _to_blocks(tree: PyTree) -> PyTree:
    """Return a result with the arrays of each chunk as a block of those of all devices."""

    def is_chunk(node: Any) -> bool:
        return isinstance(node, dict) and set(node) == {"slots", "packs"}

    return jax.tree.map(lambda a: to_block(a) if is_chunk(a) else a, tree, is_leaf=is_chunk)
