"""Build a small network with statistics, dropout, skips and tied weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import random_keys

WIDTH, CLASSES = 6, 5
QUICK = {"xla_backend_optimization_level": 0}  # for compiling, not for running


class Normed(nnx.Module):
    """Apply linear, batch norm, tanh, and dropout whose rate grows during training.

    The linear layer has no bias: its gradient would be zero but for rounding.
    """

    def __init__(
        self, features: int = WIDTH, rate: float = 0.3, axis: str | None = None, *, rngs: nnx.Rngs
    ) -> None:
        self.linear = nnx.Linear(features, features, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, axis_name=axis, rngs=rngs)
        self.rate, self.dropout = rate, nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs, progress: Any) -> jax.Array:
        y = jnp.tanh(self.norm(self.linear(x) + 1))  # a mean to track
        return (1 - self.rate * progress) * y + self.rate * progress * self.dropout(y, rngs=rngs)


class Stem(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (CLASSES, WIDTH)))
        self.bias = nnx.Param(0.1 * jax.random.normal(rngs.params(), (WIDTH,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table[...] + self.bias[...]


class Head(nnx.Module):
    """Compute scores with the table of the stem."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (CLASSES, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table[...].T


class Keep(nnx.Module):
    """Pass on one half of the output, and stash two arrays, one of them integers."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple:
        y = self.linear(x)
        return jnp.tanh(y), {"sign": (y > 0).astype(jnp.int32), "y": jnp.sin(y)}


class Use(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, pair: tuple) -> jax.Array:
        x, kept = pair
        return self.linear(x) + kept["y"] * (0.5 + kept["sign"])


class KeepAgain(nnx.Module):
    """Pop one tensor, and stash another under the same name."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, pair: tuple) -> tuple:
        x, kept = pair
        return jnp.tanh(self.linear(x)) + kept["y"], {**kept, "y": jnp.cos(x)}


def all_links(rate: float = 0.3, axis: str | None = None) -> list[gpipe.Layer]:
    """Return 12 layers with a tied table; the skip "long" crosses nine, "again" is used twice."""
    normed = gpipe.layer(Normed, rate=rate, axis=axis)
    return [
        gpipe.layer(Stem).tie("table", "table"),
        gpipe.layer(Keep).stash("long"),
        normed,
        gpipe.layer(Keep).stash("again"),
        normed,
        gpipe.layer(KeepAgain).pop("again").stash("again"),
        gpipe.layer(Keep).stash("short"),
        gpipe.layer(Use).pop("short"),
        normed,
        gpipe.layer(Use).pop("again"),
        gpipe.layer(Use).pop("long"),
        gpipe.layer(Head).tie("table", "table"),
    ]


class Dropped(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.3)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return self.dropout(jnp.tanh(self.linear(x)), rngs=rngs)


def without_norm() -> list[gpipe.Layer]:
    """Return layers with dropout, of which none depends on a micro-batch as a whole."""
    table = ("table", "table")
    stem, head = gpipe.layer(Stem).tie(*table), gpipe.layer(Head).tie(*table)
    return [stem, *[gpipe.layer(Dropped)] * 3, head]


def make_batch(examples: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(examples, CLASSES)),
        "labels": rng.integers(0, CLASSES, examples),
        "weights": rng.uniform(0.5, 2.0, examples),
    }


def run_sequential(
    layers: list[gpipe.Layer],
    batches: list[dict],
    loss: Any = gpipe.losses.softmax_cross_entropy,
    *,
    M: int,
    D: int,
    keys_per: str = "micro_batch",
    steps: int | None = None,
) -> tuple:
    """Return (params, stats before, (loss, metrics), grads, stats after), without updates.

    Every batch is one step; the loss and the gradients are those of the last one.
    """
    batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    first = jax.tree.map(lambda a: a[:1], batches[0]["inputs"])
    init = jax.jit(lambda: sequential.init(layers, first, seed=1), compiler_options=QUICK)
    params, fresh = init()
    step = jax.jit(
        sequential.value_and_grad(layers, loss, M, replicas=D, keys_per=keys_per),
        compiler_options=QUICK,
    )
    stats, result, grads = fresh, None, None
    for i, batch in enumerate(batches):
        progress = jnp.asarray(1.0 if steps is None else min(i / steps, 1.0))
        result, grads, stats = step(params, stats, batch, random_keys.step_key(1, i), progress)
    return jax.device_get((params, fresh, result, grads, stats))
