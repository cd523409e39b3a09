"""Compute the pairs of a cell in a loop over its slots, each an operation chosen by number.

A pair is the sum of two slots; a slot is an operation and the state that it reads. States of equal
shape form a group, an array [states, B, H, W, C]. The last group holds the states that the pairs
make:

    groups[0]   state 0, state 1                    the inputs of the cell
    groups[-1]  ..., state 2, state 3, ...          (in a normal cell there is one group for all)
                     slots 0 and 1, slots 2 and 3, ...

The gradient is written by hand, as a loop back over the slots:

    forward     for j in slots:            last[target[j]] += operation[j](groups[g][source[j]])
    backward    for j in reversed(slots):  dgroups[g][source[j]] += its gradient for dlast[target]

It saves only the groups as they are at the end, and computes each operation again. To save what the
operations need, every slot would reserve, and fill, as much memory as the largest of them needs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nas.training.interpreter.operation_union import OperationUnion
from nas.training.interpreter.projection import element

Groups = tuple[jax.Array, ...]


class SlotInstructions(NamedTuple):
    """Tell each slot what to do, int32 [slots] each."""

    branch: jax.Array  # group * number of operations + operation
    source: jax.Array  # index, within its group, of the state to read
    target: jax.Array  # index, within the last group, of the state to add to


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_slots(
    union: OperationUnion,
    train: bool,
    instructions: SlotInstructions,
    parameters: jax.Array,
    statistics: jax.Array,
    groups: Groups,
) -> tuple[jax.Array, jax.Array]:
    """Return the last group with all pairs added, and the new statistics.

    Args:
        union: Layer g * n + o is operation o for states of group g; n is the number of operations.
        train: Whether batch norms use and record the statistics of the batch.
        instructions: What each slot does.
        parameters: A vector for each slot.
        statistics: A vector for each slot.
        groups: The states, zero where a pair is to be added.
    """

    def branch(i: int) -> Callable:
        group = _group(union, groups, i)

        def run(
            parameters: jax.Array, statistics: jax.Array, source: jax.Array, groups: Groups
        ) -> tuple:
            x = element(groups[group], source)
            return union.apply(i, parameters, statistics, x, train=train)

        return run

    branches = [branch(i) for i in range(len(union.layers))]

    def slot(last: jax.Array, of_slot: tuple) -> tuple[jax.Array, jax.Array]:
        (number, source, target), parameters, statistics = of_slot
        arguments = (parameters, statistics, source, (*groups[:-1], last))
        y, statistics = lax.switch(number, branches, *arguments)
        return _add(last, target, y), statistics

    return lax.scan(slot, groups[-1], (instructions, parameters, statistics))


def _group(union: OperationUnion, groups: Groups, branch: int) -> int:
    return branch * len(groups) // len(union.layers)


def _add(buffer: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, element(buffer, i) + x, i, 0)


# --- the gradient ---------------------------------------------------------------------------------


def _forward(
    union: OperationUnion,
    train: bool,
    instructions: SlotInstructions,
    parameters: jax.Array,
    statistics: jax.Array,
    groups: Groups,
) -> tuple:
    if not train:
        raise ValueError("`train` is False, but the gradient is that of training; set it to True")
    arguments = (union, train, instructions, parameters, statistics, groups)
    last, updated = run_slots(*arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return (last, updated), (instructions, parameters, statistics, (*groups[:-1], last))


def _backward(union: OperationUnion, train: bool, residuals: tuple, cotangents: tuple) -> tuple:
    instructions, parameters, statistics, groups = residuals

    def branch(i: int) -> Callable:
        own = _group(union, groups, i)

        def run(
            parameters: jax.Array,
            statistics: jax.Array,
            source: jax.Array,
            groups: Groups,
            dy: jax.Array,
        ) -> Any:
            def value(parameters: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
                return union.apply(i, parameters, statistics, x, train=train)

            x = element(groups[own], source)
            dparameters, dx = jax.vjp(value, parameters, x, has_aux=True)[1](dy)
            zeros = [jnp.zeros(group.shape[1:], group.dtype) for group in groups]
            return dparameters, [dx if g == own else zero for g, zero in enumerate(zeros)]

        return run

    branches = [branch(i) for i in range(len(union.layers))]

    def slot(dgroups: Groups, of_slot: tuple) -> tuple[Groups, jax.Array]:
        (number, source, target), parameters, statistics = of_slot
        dy = element(dgroups[-1], target)
        arguments = (parameters, statistics, source, groups, dy)
        dparameters, dx = lax.switch(number, branches, *arguments)
        added = (_add(d, source, a) for d, a in zip(dgroups, dx, strict=True))
        return tuple(added), dparameters

    dlast, _ = cotangents  # statistics are not differentiated
    others = tuple(jnp.zeros_like(group) for group in groups[:-1])
    dgroups, dparameters = lax.scan(
        slot, (*others, dlast), (instructions, parameters, statistics), reverse=True
    )
    return None, dparameters, None, dgroups


run_slots.defvjp(_forward, _backward)
