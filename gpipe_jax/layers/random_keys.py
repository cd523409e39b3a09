"""The keys of all randomness: of the step, the layer and the micro-batch, never of a tick or stage.

So initial parameters and dropout are the same however the network is cut and scheduled. Keys of
single examples make dropout independent of the number of micro-batches and replicas too.
"""

import functools
import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp


def layer_key(seed: int | jax.Array, layer_id: int | jax.Array) -> jax.Array:
    """The key that a layer is initialised from; independent of how the network is cut."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), layer_id)


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The key of all randomness of one training step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def apply_key(
    step: jax.Array,
    layer_id: int | jax.Array,
    micro_batch: int | jax.Array,
    examples: int | None = None,
) -> jax.Array:
    """The key of one layer on one micro-batch, from `step_key`; never of a tick or a stage.

    With the number of `examples` of a micro-batch, the key is one for each of them: the arrays it
    draws must have the examples as their first axis, and row i depends on the i-th example's place
    in the whole batch only.
    """
    key = jax.random.fold_in(step, layer_id)
    if examples is None:
        return jax.random.fold_in(key, micro_batch)
    ids = micro_batch * examples + jnp.arange(examples)
    data = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(ids)
    return jax.random.wrap_key_data(data, impl=_one_for_each(examples))


@functools.cache
def _one_for_each(examples: int) -> Any:
    """A generator whose key is B threefry keys, and that draws row i of an array from the i-th."""

    def one(data: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(data, impl="threefry2x32")

    def bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        if shape[:1] != (examples,):
            raise ValueError(
                f"with random keys of single examples the first axis of what is drawn must be the "
                f"{examples} examples of a micro-batch, got shape {list(shape)}; "
                f"draw for each example, or use keys of micro-batches"
            )
        return jax.vmap(lambda d: jax.random.bits(one(d), shape[1:], f"uint{width}"))(data)

    def split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        parts = jax.vmap(lambda d: jax.random.key_data(jax.random.split(one(d), math.prod(shape))))
        return jnp.swapaxes(parts(data), 0, 1).reshape(*shape, *data.shape)

    def fold_in(data: jax.Array, i: Any) -> jax.Array:
        return jax.vmap(lambda d: jax.random.key_data(jax.random.fold_in(one(d), i)))(data)

    def seed(value: jax.Array) -> jax.Array:
        ids = jnp.arange(examples)
        return jax.vmap(lambda i: jax.random.key_data(jax.random.key(value + i)))(ids)

    return jax.extend.random.define_prng_impl(
        key_shape=(examples, 2),
        seed=seed,
        split=split,
        random_bits=bits,
        fold_in=fold_in,
        name=f"one_for_each_of_{examples}",
        tag="each",
    )
