"""Check the losses that a config names, on pipelines: as optax on the plain program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import CLASSES, LAYERS, dense, embed, scores

import gpipe_jax as gpipe
from gpipe_jax.config import loader
from gpipe_jax.training import from_config

EXAMPLES, LENGTH = 8, 3


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def make_batch(kind: str) -> dict:
    rng = np.random.default_rng(0)
    shape = (EXAMPLES,) if kind == "classification" else (EXAMPLES, LENGTH)
    labels: Any = rng.integers(0, CLASSES, shape)
    if kind in ("binary_cross_entropy", "squared_error"):
        labels = rng.uniform(size=(*shape, CLASSES))
    if kind == "token_cross_entropy":
        labels[rng.uniform(size=shape) < 0.4] = -1
    inputs = rng.normal(size=(*shape, CLASSES))
    return {"inputs": inputs, "labels": labels, "weights": rng.uniform(0.5, 2, EXAMPLES)}


# --- each loss of an element, and its share of the mean -------------------------------------------


def cross_entropy(smoothing: float, z_loss: float = 0.0) -> Callable:
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES, dtype=float), smoothing)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return optax.softmax_cross_entropy(logits, targets) + z_loss * log_z**2

    return loss


def binary(smoothing: float) -> Callable:
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = (1 - smoothing) * labels + smoothing / 2
        return optax.sigmoid_binary_cross_entropy(logits, targets)

    return loss


KINDS: dict[str, tuple[dict, Callable]] = {
    "classification": ({"label_smoothing": 0.1}, cross_entropy(0.1)),
    "token_cross_entropy": (
        {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": -1},
        cross_entropy(0.1, 0.01),
    ),
    "binary_cross_entropy": ({"label_smoothing": 0.1}, binary(0.1)),
    "squared_error": ({}, lambda outputs, labels: (outputs - labels) ** 2),
}


def plain_loss(kind: str, params: list, batch: dict) -> jax.Array:
    first, *body, _ = params
    x = embed(first, batch["inputs"])
    for own in body:
        x = dense(own, x)
    losses = KINDS[kind][1](scores(first, x), batch["labels"])
    ignored = batch["labels"] == -1 if kind == "token_cross_entropy" else jnp.zeros(losses.shape)
    weights = batch["weights"].reshape(-1, *(1 for _ in losses.shape[1:]))
    shares = jnp.where(ignored, 0, jnp.broadcast_to(weights, losses.shape))
    return (shares * jnp.where(ignored, 0, losses)).sum() / shares.sum()


FEW = [("binary_cross_entropy", 2, 2), ("token_cross_entropy", 2, 1)]


@pytest.mark.parametrize(
    ("kind", "K", "D"),
    [
        pytest.param(kind, K, D, marks=() if (kind, K, D) in FEW else pytest.mark.slow)
        for kind in KINDS
        for K, D in ((1, 1), (2, 1), (2, 2), (4, 1))
    ],
)
def test_as_the_plain_program(kind: str, K: int, D: int) -> None:
    config = loader.load(
        {
            "model": {"kind": "mlp"},
            "data": {"kind": "digits"},
            "loss": {"kind": kind, **KINDS[kind][0]},
        }
    )
    batch = make_batch(kind)
    pipe = gpipe.Pipeline(
        LAYERS,
        loss=from_config.loss_of(config),
        mesh=gpipe.make_mesh(stages=K, data=D),
        example=batch,
        micro_batches=2,
    )
    state = pipe.init(seed=1)
    (loss, _), gradients, _ = pipe.value_and_grad(state, batch)
    params = jax.tree.map(jnp.asarray, pipe.to_layers(state))
    expected = jax.jit(jax.value_and_grad(plain_loss, argnums=1), static_argnums=0)
    value, grads = expected(kind, params, batch)
    np.testing.assert_allclose(loss, value, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        pipe.to_layers(gradients),
        grads,
    )
