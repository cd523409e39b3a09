"""The pairs of a cell, computed in a loop over its slots: an operation each, chosen by number.

States are in groups of equal shape, an array [states, B, H, W, C] each; what the pairs make is in
the last group. The gradient is written by hand, as a loop back over the slots:

    forward     for j in slots:            last[target[j]] += operation[j](groups[g][local[j]])
    backward    for j in reversed(slots):  dgroups[g][local[j]] += gradient of it for dlast[target]

which saves the groups as they are in the end. Each operation is computed again: what it could save
would be, for each slot, as large as the most that any operation saves, and take as long to store.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nas.training.interpreter.operation_union import Union
from nas.training.interpreter.projection import at

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
            return union.call(i, p, s, x, train=train)

        return run

    branches = [branch(i) for i in range(len(union.layers))]

    def slot(last: jax.Array, step: tuple) -> tuple[jax.Array, jax.Array]:
        (number, local, target), p, s = step
        y, s = lax.switch(number, branches, p, s, local, (*groups[:-1], last))
        return _add(last, target, y), s

    return lax.scan(slot, groups[-1], (steps, parameters, statistics))


def _group(union: Union, groups: Groups, branch: int) -> int:
    return branch * len(groups) // len(union.layers)


def _add(buffer: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, at(buffer, i) + x, i, 0)


# --- the gradient ---------------------------------------------------------------------------------


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
    arguments = (union, train, steps, parameters, statistics, groups)
    last, new = run_slots(*arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return (last, new), (steps, parameters, statistics, (*groups[:-1], last))


def _backward(union: Union, train: bool, residuals: tuple, cotangents: tuple) -> tuple:
    steps, parameters, statistics, groups = residuals

    def branch(i: int) -> Callable:
        def run(p: jax.Array, s: jax.Array, local: jax.Array, groups: Groups, dy: jax.Array) -> Any:
            def value(p: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
                return union.call(i, p, s, x, train=train)

            mine = _group(union, groups, i)
            dp, dx = jax.vjp(value, p, at(groups[mine], local), has_aux=True)[1](dy)
            zeros = [jnp.zeros(group.shape[1:], group.dtype) for group in groups]
            return dp, [dx if g == mine else zero for g, zero in enumerate(zeros)]

        return run

    branches = [branch(i) for i in range(len(union.layers))]

    def slot(dgroups: Groups, step: tuple) -> tuple[Groups, jax.Array]:
        (number, local, target), p, s = step
        dy = at(dgroups[-1], target)
        dp, dx = lax.switch(number, branches, p, s, local, groups, dy)
        return tuple(_add(d, local, a) for d, a in zip(dgroups, dx, strict=True)), dp

    others = tuple(jnp.zeros_like(group) for group in groups[:-1])
    dgroups, dparameters = lax.scan(
        slot, (*others, cotangents[0]), (steps, parameters, statistics), reverse=True
    )
    return None, dparameters, None, dgroups


run_slots.defvjp(_forward, _backward)
