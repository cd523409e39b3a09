"""Provide a conditional whose gradient is a second conditional."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from gpipe_jax.utils.trees import PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def switch(
    branches: tuple[Callable, ...],
    index: jax.Array,
    integers: PyTree,
    parameters: PyTree,
    statistics: PyTree,
    x: PyTree,
) -> tuple[PyTree, PyTree]:
    """Return `branches[index](integers, parameters, statistics, x)`, a pair (y, statistics).

    y can be differentiated by `parameters` and `x`. The forward pass saves the arguments only, and
    the backward pass computes the branch again. JAX's own gradient of `lax.switch` would save what
    any of the branches needs.
    """
    return lax.switch(index, branches, integers, parameters, statistics, x)


def _forward(branches: tuple[Callable, ...], *arguments: Any) -> tuple:
    return switch(branches, *arguments), arguments


def _backward(branches: tuple[Callable, ...], saved: tuple, cotangents: tuple) -> tuple:
    index, *arguments = saved

    def gradient(branch: Callable) -> Callable:
        def run(
            integers: PyTree, parameters: PyTree, statistics: PyTree, x: PyTree, dy: PyTree
        ) -> Any:
            def value(parameters: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
                return branch(integers, parameters, statistics, x)

            _, pull_back, _ = jax.vjp(value, parameters, x, has_aux=True)
            return pull_back(dy)

        return run

    dy, _ = cotangents  # statistics are not differentiated
    dparameters, dx = lax.switch(index, [*map(gradient, branches)], *arguments, dy)
    return None, None, dparameters, None, dx


switch.defvjp(_forward, _backward)
