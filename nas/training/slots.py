"""The pairs of a cell, computed in a loop over its slots: an operation each, chosen by number.

States are in groups of equal shape, an array [states, B, H, W, C] each; what the pairs make is in
the last group. The gradient is written by hand, as a loop back over the slots:

    forward     for j in slots:            last[target[j]] += operation[j](groups[g][local[j]])
    backward    for j in reversed(slots):  dgroups[g][local[j]] += gradient of it for dlast[target]

which saves the groups as they are in the end, and of each slot what its operation wants saved:
depthwise convolutions, the only costly part. The rest is computed again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.layers.conv import DEPTHWISE
from nas.training.project import at
from nas.training.union import Union

PyTree = Any
Groups = tuple[jax.Array, ...]


class Steps(NamedTuple):
    """What each slot does, int32 [slots] each."""

    branch: jax.Array  # group * number of operations + operation
    local: jax.Array  # the place in its group of the state that is read
    target: jax.Array  # the place in the last group of the state that is added to


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_slots(
    union: Union,
    train: bool,
    steps: Steps,
    parameters: jax.Array,
    statistics: jax.Array,
    groups: Groups,
) -> tuple[jax.Array, jax.Array]:
    """The last group with all pairs added, and the statistics.

    Layer g * n + o of the union is operation o for states of group g, n being the number of
    operations. `parameters` and `statistics` have a vector for each slot.
    """

    def branch(i: int) -> Callable:
        def run(p: jax.Array, s: jax.Array, local: jax.Array, groups: Groups) -> tuple:
            x = at(groups[_group(union, groups, i)], local)
            return (*union.call(i, p, s, x, train=train), ())

        return run

    last, statistics, _ = _loop(union, branch, steps, parameters, statistics, groups)
    return last, statistics


def _group(union: Union, groups: Groups, branch: int) -> int:
    return branch * len(groups) // len(union.layers)


def _loop(
    union: Union,
    branch: Callable,
    steps: Steps,
    parameters: jax.Array,
    statistics: jax.Array,
    groups: Groups,
) -> tuple[jax.Array, jax.Array, PyTree]:
    branches = [branch(i) for i in range(len(union.layers))]

    def slot(last: jax.Array, step: tuple) -> tuple[jax.Array, tuple]:
        (number, local, target), p, s = step
        y, s, saved = lax.switch(number, branches, p, s, local, (*groups[:-1], last))
        return _add(last, target, y), (s, saved)

    last, (statistics, saved) = lax.scan(slot, groups[-1], (steps, parameters, statistics))
    return last, statistics, saved


def _add(buffer: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, at(buffer, i) + x, i, 0)


# --- the gradient ---------------------------------------------------------------------------------


def _pullback(
    union: Union, i: int, p: jax.Array, s: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array, list, list[int], Any]:
    """(y, statistics, leaves, places, structure): the gradient's leaves, and which are computed."""

    def value(p: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return union.call(i, p, s, x, train=True)

    policy = jax.checkpoint_policies.save_only_these_names(DEPTHWISE)
    lean = jax.checkpoint(value, policy=policy, prevent_cse=False)
    y, pull, s = jax.vjp(lean, p, x, has_aux=True)
    leaves, structure = jax.tree.flatten(pull)
    # What else there is are the arguments and constants.
    places = [k for k, leaf in enumerate(leaves) if leaf.ndim == 4 and leaf is not x]
    return y, s, leaves, places, structure


def _saved_shapes(
    union: Union, p: jax.Array, s: jax.Array, groups: Groups
) -> list[jax.ShapeDtypeStruct]:
    """The widest array that any operation saves first, second, ..."""
    widest: list[jax.ShapeDtypeStruct] = []
    for i in range(len(union.layers)):

        def one(p: jax.Array, s: jax.Array, x: jax.Array, i: int = i) -> list[jax.Array]:
            _, _, leaves, places, _ = _pullback(union, i, p, s, x)
            return [leaves[k] for k in places]

        found = jax.eval_shape(one, p, s, groups[_group(union, groups, i)][0])
        for k, a in enumerate(found):
            if k == len(widest):
                widest.append(a)
            elif a.shape[-1] > widest[k].shape[-1]:
                widest[k] = a
    return widest


def _forward(
    union: Union,
    train: bool,
    steps: Steps,
    parameters: jax.Array,
    statistics: jax.Array,
    groups: Groups,
) -> tuple:
    if not train:
        raise ValueError("`train` is False, but the gradient is that of training; set it to True")
    shapes = _saved_shapes(union, parameters[0], statistics[0], groups)

    def branch(i: int) -> Callable:
        def run(p: jax.Array, s: jax.Array, local: jax.Array, groups: Groups) -> tuple:
            x = at(groups[_group(union, groups, i)], local)
            y, s, leaves, places, _ = _pullback(union, i, p, s, x)
            return y, s, _widened([leaves[k] for k in places], shapes)

        return run

    last, new, saved = _loop(union, branch, steps, parameters, statistics, groups)
    return (last, new), (steps, parameters, statistics, (*groups[:-1], last), saved)


def _widened(arrays: list[jax.Array], shapes: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    def one(k: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if k >= len(arrays):
            return jnp.zeros(shape.shape, shape.dtype)
        room = shape.shape[-1] - arrays[k].shape[-1]
        return jnp.pad(arrays[k], ((0, 0), (0, 0), (0, 0), (0, room)))

    return [one(k, shape) for k, shape in enumerate(shapes)]


def _backward(union: Union, train: bool, residuals: tuple, cotangents: tuple) -> tuple:
    del train
    steps, parameters, statistics, groups, saved = residuals

    def branch(i: int) -> Callable:
        def run(p: Any, s: Any, local: Any, groups: Groups, saved: list, dy: Any) -> tuple:
            mine = _group(union, groups, i)
            x = at(groups[mine], local)
            _, _, leaves, places, structure = _pullback(union, i, p, s, x)
            for k, array in zip(places, saved, strict=False):
                leaves[k] = array[..., : leaves[k].shape[-1]]
            dp, dx = jax.tree.unflatten(structure, leaves)(dy)
            zeros = [jnp.zeros(group.shape[1:], group.dtype) for group in groups]
            return dp, [dx if g == mine else zero for g, zero in enumerate(zeros)]

        return run

    branches = [branch(i) for i in range(len(union.layers))]

    def slot(dgroups: Groups, step: tuple) -> tuple[Groups, jax.Array]:
        (number, local, target), p, s, kept = step
        dy = at(dgroups[-1], target)
        dp, dx = lax.switch(number, branches, p, s, local, groups, kept, dy)
        return tuple(_add(d, local, a) for d, a in zip(dgroups, dx, strict=True)), dp

    others = tuple(jnp.zeros_like(group) for group in groups[:-1])
    dgroups, dparameters = lax.scan(
        slot, (*others, cotangents[0]), (steps, parameters, statistics, saved), reverse=True
    )
    return None, dparameters, None, dgroups


run_slots.defvjp(_forward, _backward)
