"""Build a small network with a tied table, as a pipeline and as a plain program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpipe_jax as gpipe

STEPS, DEPTH, WIDTH, CLASSES = 3, 4, 5, 4
LOSS = gpipe.losses.softmax_cross_entropy


def table_init(key: jax.Array, x: jax.Array) -> dict:
    return {"table": jax.random.normal(key, (CLASSES, WIDTH))}


def dense_init(key: jax.Array, x: jax.Array) -> dict:
    kernel = jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
    return {"kernel": kernel, "bias": kernel[0] / 10}


def embed(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["table"]


def dense(params: dict, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ params["kernel"] + params["bias"])


def scores(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["table"].T


LAYERS = [
    gpipe.layer(table_init, embed).tie("table", "table"),
    *[gpipe.layer(dense_init, dense)] * DEPTH,
    gpipe.layer(table_init, scores).tie("table", "table"),
]


def make_batch(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"inputs": rng.normal(size=(8, CLASSES)), "labels": rng.integers(0, CLASSES, 8)}


def make_pipe(K: int = 1, D: int = 1, V: int = 1, **options: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        LAYERS,
        loss=LOSS,
        mesh=gpipe.make_mesh(stages=K, data=D),
        example=make_batch(0),
        micro_batches=2,
        chunks=V,
        **options,
    )


def trained(pipe: gpipe.Pipeline, tx: Any) -> tuple[list, gpipe.TrainState]:
    """Return the parameters of each layer after a few steps, and the training state."""
    trainer = gpipe.Trainer(pipe, tx)
    current = trainer.init(seed=1)
    for step in range(STEPS):
        current, _ = trainer.step(current, make_batch(step))
    return pipe.to_layers(current.state), current


def plainly_trained(tx: optax.GradientTransformation, frozen: tuple[int, ...] = ()) -> list:
    """Train the plain program; the parameters of `frozen` layers are no leaves for `tx`."""
    pipe = make_pipe()
    whole = jax.tree.map(jnp.asarray, pipe.to_layers(pipe.init(seed=1)))
    params: Any = [None if i in frozen else own for i, own in enumerate(whole)]

    def loss(params: list, batch: dict) -> jax.Array:
        first, *body, _ = (
            kept if own is None else own for own, kept in zip(params, whole, strict=True)
        )
        x = functools.reduce(lambda x, own: dense(own, x), body, embed(first, batch["inputs"]))
        return LOSS(scores(first, x), batch["labels"])[0].mean()

    gradient, state = jax.jit(jax.grad(loss)), tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(gradient(params, make_batch(step)), state, params)
        params = optax.apply_updates(params, updates)
    return [kept if own is None else own for own, kept in zip(params, whole, strict=True)]


def assert_close(trees: list, expected: list) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), trees, expected
    )


def is_matrix(tree: Any) -> Any:
    """Mask the parameters that decay."""
    return jax.tree.map(lambda a: a.ndim > 1, tree)
