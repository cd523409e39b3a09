"""The 1x1 convolution of a concatenation, as a sum over the states that are concatenated.

So neither the concatenation nor the states that are not in it cost anything:

    concat(states)  @ kernel  =  sum of  states[s] @ kernel[s]  over the s in concat
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
    """relu and a 1x1 convolution of the concatenated states [S, B, H, W, C] to [B, H, W, F].

    `kernels` is {"kernel": [S, C, F]}; or {"even", "odd"}, for half the resolution.
    """
    return _sum(_half if "even" in kernels else _whole, concat, kernels, states)


def _whole(kernels: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return convolve(jax.nn.relu(x), kernels["kernel"][None, None])


def _half(kernels: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return halve(jax.nn.relu(x), kernels["even"][None, None], kernels["odd"][None, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(part: Callable, concat: Concat, kernels: PyTree, states: jax.Array) -> jax.Array:
    """The sum of part(kernels[s], states[s]) over the s in concat."""
    shape = jax.eval_shape(part, at(kernels, 0), states[0])
    # In float32 at least, as within one convolution.
    zero = jnp.zeros(shape.shape, jnp.promote_types(shape.dtype, jnp.float32))

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        s = jnp.asarray(concat.order)[k]
        return total + part(at(kernels, s), at(states, s)).astype(zero.dtype)

    return lax.fori_loop(0, concat.count, add, zero).astype(shape.dtype)


def _forward(part: Callable, concat: Concat, kernels: PyTree, states: jax.Array) -> tuple:
    return _sum(part, concat, kernels, states), (concat, kernels, states)


def _backward(part: Callable, saved: tuple, dy: jax.Array) -> tuple:
    concat, kernels, states = saved

    def put(k: jax.Array, gradients: PyTree) -> PyTree:
        s = jnp.asarray(concat.order)[k]
        new = jax.vjp(part, at(kernels, s), at(states, s))[1](dy)
        return jax.tree.map(
            lambda a, b: lax.dynamic_update_index_in_dim(a, b, s, 0), gradients, new
        )

    zeros = jax.tree.map(jnp.zeros_like, (kernels, states))
    return None, *lax.fori_loop(0, concat.count, put, zeros)


_sum.defvjp(_forward, _backward)


def at(tree: PyTree, i: int | jax.Array) -> PyTree:
    """Element i of the first axis of every array."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree)
