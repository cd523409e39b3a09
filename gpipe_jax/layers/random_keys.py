"""Derive all random keys: from the step, the layer and the micro-batch, never a tick or a stage.

So initial parameters and dropout do not depend on how the network is cut and scheduled. With keys
of single examples, dropout does not depend on the number of micro-batches and replicas either.
"""

import functools
import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp


def layer_key(seed: int | jax.Array, layer_id: int | jax.Array) -> jax.Array:
    """Return the key that initialises a layer; it does not depend on how the network is cut."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), layer_id)


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Return the key of all randomness in one training step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def apply_key(
    step: jax.Array,
    layer_id: int | jax.Array,
    micro_batch: int | jax.Array,
    examples: int | None = None,
) -> jax.Array:
    """Return the key of one layer on one micro-batch, from `step_key`.

    With the number of `examples` of a micro-batch, each example has a key of its own. The arrays
    drawn must then have the examples as their first axis. Row i depends only on the position of
    example i in the whole batch. So these keys are always threefry's: with other generators the
    rows of a batch depend on each other.
    """
    key = jax.random.fold_in(step, layer_id)
    if examples is None:
        return jax.random.fold_in(key, micro_batch)
    key = _of_threefry(key)
    ids = micro_batch * examples + jnp.arange(examples)
    data = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(ids)
    return jax.random.wrap_key_data(data, impl=_one_for_each(examples))


def _of_threefry(key: jax.Array) -> jax.Array:
    """Return the key of the generator threefry with the first words of a key of any generator."""
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key)[:2], impl="threefry2x32")


@functools.cache  # one object for all calls; it depends on no setting of JAX
def _one_for_each(examples: int) -> Any:
    """Return a generator whose key is B threefry keys; key i draws row i of an array."""

    def threefry(data: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(data, impl="threefry2x32")

    def bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        if shape[:1] != (examples,):
            raise ValueError(
                f"with random keys of single examples the first axis of what is drawn must be the "
                f"{examples} examples of a micro-batch, got shape {list(shape)}; "
                f"draw for each example, or use keys of micro-batches"
            )
        return jax.vmap(lambda d: jax.random.bits(threefry(d), shape[1:], f"uint{width}"))(data)

    def split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        def split_key(key: jax.Array) -> jax.Array:
            return jax.random.key_data(jax.random.split(threefry(key), math.prod(shape)))

        return jnp.swapaxes(jax.vmap(split_key)(data), 0, 1).reshape(*shape, *data.shape)

    def fold_in(data: jax.Array, i: Any) -> jax.Array:
        return jax.vmap(lambda d: jax.random.key_data(jax.random.fold_in(threefry(d), i)))(data)

    def seed(value: jax.Array) -> jax.Array:
        ids = jnp.arange(examples)
        return jax.vmap(
            lambda i: jax.random.key_data(jax.random.key(value + i, impl="threefry2x32"))
        )(ids)

    return jax.extend.random.define_prng_impl(
        key_shape=(examples, 2),
        seed=seed,
        split=split,
        random_bits=bits,
        fold_in=fold_in,
        name=f"one_for_each_of_{examples}",
        tag="each",
    )
