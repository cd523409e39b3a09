"""Project a concatenation with a 1x1 convolution, as a sum over the states in it:

    concat(states)  @ kernel  =  sum of  states[s] @ kernel[s]  over the s in concat

Neither the concatenation nor the states outside of it cost anything this way.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import convolve, halve
from nas.training.interpreter.encoding import Concat


def project(concat: Concat, kernels: dict[str, jax.Array], states: jax.Array) -> jax.Array:
    """Apply relu and a 1x1 convolution to the concatenated states.

    Args:
        concat: The states that are concatenated.
        kernels: {"kernel": [S, C, F]}, or {"even", "odd"} to halve the resolution.
        states: All states, [S, B, H, W, C].

    Returns:
        [B, H, W, F], or half of H and W.
    """
    term = _half_resolution if "even" in kernels else _full_resolution
    return _sum_over(term, concat, kernels, states)


def _full_resolution(kernels: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return convolve(jax.nn.relu(x), kernels["kernel"][None, None])


def _half_resolution(kernels: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return halve(jax.nn.relu(x), kernels["even"][None, None], kernels["odd"][None, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over(term: Callable, concat: Concat, kernels: PyTree, states: jax.Array) -> jax.Array:
    """Sum term(kernels[s], states[s]) over the s in concat."""
    shape = jax.eval_shape(term, element(kernels, 0), states[0])
    # In float32 at least, as within one convolution.
    zero = jnp.zeros(shape.shape, jnp.promote_types(shape.dtype, jnp.float32))

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        s = jnp.asarray(concat.order)[k]
        return total + term(element(kernels, s), element(states, s)).astype(zero.dtype)

    return lax.fori_loop(0, concat.count, add, zero).astype(shape.dtype)


def _forward(term: Callable, concat: Concat, kernels: PyTree, states: jax.Array) -> tuple:
    return _sum_over(term, concat, kernels, states), (concat, kernels, states)


def _backward(term: Callable, saved: tuple, dy: jax.Array) -> tuple:
    concat, kernels, states = saved

    def put(k: jax.Array, gradients: PyTree) -> PyTree:
        s = jnp.asarray(concat.order)[k]
        gradient = jax.vjp(term, element(kernels, s), element(states, s))[1](dy)
        return jax.tree.map(
            lambda a, b: lax.dynamic_update_index_in_dim(a, b, s, 0), gradients, gradient
        )

    zeros = jax.tree.map(jnp.zeros_like, (kernels, states))
    return None, *lax.fori_loop(0, concat.count, put, zeros)


_sum_over.defvjp(_forward, _backward)


def element(tree: PyTree, i: int | jax.Array) -> PyTree:
    """Return element i of the first axis of every array."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)
