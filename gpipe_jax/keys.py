"""The keys of all randomness: of the step, the layer and the micro-batch, never of a tick or stage.

So initial parameters and dropout are the same however the network is cut and scheduled.
"""

import jax


def layer_key(seed: int | jax.Array, layer_id: int | jax.Array) -> jax.Array:
    """The key that a layer is initialised from; independent of how the network is cut."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), layer_id)


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The key of all randomness of one training step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def apply_key(
    step: jax.Array, layer_id: int | jax.Array, micro_batch: int | jax.Array
) -> jax.Array:
    """The key of one layer on one micro-batch, from `step_key`; never of a tick or a stage."""
    return jax.random.fold_in(jax.random.fold_in(step, layer_id), micro_batch)
