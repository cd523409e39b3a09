"""Define losses: (outputs, labels) -> losses of the examples, or (losses, metrics of the examples).

The first axis of each returned array is the examples; further axes (positions) are averaged. The
pipeline sums these arrays over micro-batches and replicas, with the weights of the examples. So a
loss is the weighted mean over the whole batch, whatever the number of micro-batches.

A loss may be an object with a method `count(labels) -> [B]`: how much each example counts, beside
its weight. With the number of its tokens, the loss is the mean over all tokens of the batch. See
`counted`.

Public: `softmax_cross_entropy`, `classification`, `token_cross_entropy`, `binary_cross_entropy`,
`squared_error`, `counted`, `NAMES`.
"""

import functools

from gpipe_jax.losses.cross_entropy import (
    classification,
    softmax_cross_entropy,
    token_cross_entropy,
)
from gpipe_jax.losses.elements import counted
from gpipe_jax.losses.elementwise import binary_cross_entropy, squared_error

# Each name of a loss, and the function of keyword arguments that returns it.
NAMES = {
    "binary_cross_entropy": binary_cross_entropy,
    "classification": classification,
    "squared_error": functools.partial(counted, squared_error),
    "token_cross_entropy": token_cross_entropy,
}

__all__ = [
    "NAMES",
    "binary_cross_entropy",
    "classification",
    "counted",
    "softmax_cross_entropy",
    "squared_error",
    "token_cross_entropy",
]
