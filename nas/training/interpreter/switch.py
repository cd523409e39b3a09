"""A conditional whose gradient is a second conditional."""

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
    code: PyTree,
    parameters: PyTree,
    statistics: PyTree,
    x: PyTree,
) -> tuple[PyTree, PyTree]:
    """`branches[index](code, parameters, statistics, x)`, which is (y, statistics).

    y can be differentiated by parameters and x. Only the arguments are saved for that, and the
    branch is computed again; JAX's own gradient saves what any of the branches would need.
    """
    return lax.switch(index, branches, code, parameters, statistics, x)


def _forward(branches: tuple[Callable, ...], *arguments: Any) -> tuple:
    return switch(branches, *arguments), arguments


def _backward(branches: tuple[Callable, ...], saved: tuple, cotangents: tuple) -> tuple:
    index, *arguments = saved

    def gradient(branch: Callable) -> Callable:
        def run(code: PyTree, parameters: PyTree, statistics: PyTree, x: PyTree, dy: PyTree) -> Any:
            def value(parameters: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
                return branch(code, parameters, statistics, x)

            _, pull, _ = jax.vjp(value, parameters, x, has_aux=True)
            return pull(dy)

        return run

    dparameters, dx = lax.switch(index, [*map(gradient, branches)], *arguments, cotangents[0])
    return None, None, dparameters, None, dx


switch.defvjp(_forward, _backward)
