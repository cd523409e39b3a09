"""Losses that count elements: the mean over the tokens of the whole batch, on any layout."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpipe_jax as gpipe
from gpipe_jax import losses, sequential
from gpipe_jax.errors import DataError
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.utils.trees import PyTree
from tests.helpers import assert_trees_close

N, LENGTH, WIDTH, CLASSES = 8, 5, 4, 7
COUNTS = [5, 1, 0, 3, 2, 0, 4, 1]  # tokens of each example
WEIGHTS = [1, 2, 1, 0.5, 1, 1, 3, 0]  # of examples
SMOOTHING, Z = 0.1, 0.01


def embed_init(key: jax.Array, x: jax.Array) -> dict:
    return {"table": jax.random.normal(key, (CLASSES, WIDTH), float)}


def embed(params: dict, x: jax.Array) -> jax.Array:
    return params["table"][x]


def dense_init(out: int) -> Callable:
    return lambda key, x: {"w": jax.random.normal(key, (x.shape[-1], out), float)}


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x) @ params["w"]


LAYERS = [
    gpipe.layer(embed_init, embed),
    gpipe.layer(dense_init(WIDTH), dense),
    gpipe.layer(dense_init(WIDTH), dense),
    gpipe.layer(dense_init(CLASSES), dense),
]


def make_batch(examples: int = N, seed: int = 0) -> dict:
    """Return tokens, of which each example counts another number."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CLASSES, (examples, LENGTH + 1))
    counts = np.resize(COUNTS, examples)[:, None]
    labels = np.where(np.arange(LENGTH) < counts, tokens[:, 1:], -100)
    return {"inputs": tokens[:, :-1], "labels": labels, "weights": np.resize(WEIGHTS, examples)}


def forward(params: list, inputs: np.ndarray) -> jax.Array:
    x = embed(params[0], inputs)
    for p in params[1:]:
        x = dense(p, x)
    return x


def plain_loss(params: list, batch: dict) -> jax.Array:
    """Return the mean over all tokens, of all examples at once."""
    logits = forward(params, batch["inputs"])
    log_p = jax.nn.log_softmax(logits)
    labels = batch["labels"]
    of_label = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    entropy = -(1 - SMOOTHING) * of_label - SMOOTHING * log_p.mean(-1)
    entropy = entropy + Z * jax.nn.logsumexp(logits, axis=-1) ** 2
    weights = (labels != -100) * jnp.asarray(batch["weights"], float)[:, None]
    return (entropy * weights).sum() / weights.sum()


LOSS = losses.token_cross_entropy(label_smoothing=SMOOTHING, z_loss=Z)


def build(loss: Callable = LOSS, K: int = 2, D: int = 1, M: int = 2, **options) -> gpipe.Pipeline:
    options = {"example": make_batch(), **options}
    mesh = gpipe.make_mesh(stages=K, data=D)
    return gpipe.Pipeline(LAYERS, loss=loss, mesh=mesh, micro_batches=M, **options)


@pytest.fixture(scope="module")
def pipe() -> gpipe.Pipeline:
    """Return a pipeline that several tests use, whose programs compile once."""
    return build()


LAYOUTS = [
    (2, 2, 2, "1f1b", 1),
    (2, 1, 4, "interleaved", 2),
    (1, 1, 8, "gpipe", 1),
    (1, 1, 1, "1f1b", 1),
    (4, 1, 8, "gpipe", 1),
    (4, 2, 4, "1f1b", 1),
    (2, 4, 1, "eager_1f1b", 1),
    (2, 2, 4, "interleaved", 2),
]
FEW = [(*LAYOUTS[0], True), (*LAYOUTS[1], False)]


@pytest.mark.parametrize(
    ("K", "D", "M", "schedule", "chunks", "x64"),
    [
        pytest.param(*layout, x64, marks=() if (*layout, x64) in FEW else pytest.mark.slow)
        for layout in LAYOUTS
        for x64 in (False, True)
    ],
)
def test_the_mean_over_all_tokens(K, D, M, schedule, chunks, x64):
    """Compare loss and gradients with `jax.grad` of the whole batch, padded and full."""
    with jax.enable_x64(x64):
        pipe = build(K=K, D=D, M=M, schedule=schedule, chunks=chunks)
        state = pipe.init(0)
        params = jax.tree.map(jnp.asarray, pipe.to_layers(state))
        for examples in (N, N - 1):
            batch = jax.tree.map(lambda a, n=examples: a[:n], make_batch())
            value, gradients, _ = pipe.value_and_grad(state, batch)
            want = jax.value_and_grad(plain_loss)(params, batch)
            have = value.loss, pipe.to_layers(gradients)
            assert_trees_close(have, want, 1e-12 if x64 else 1e-5)
            assert_trees_close(pipe.evaluate(state, batch).loss, want[0], 1e-12 if x64 else 1e-5)


def test_the_mean_is_not_that_of_the_examples(pipe):
    """Check that the counts are in use: without them, short examples count as much."""
    batch = make_batch()
    other = build(loss=Uncounted(LOSS))
    state = pipe.init(0)
    difference = pipe.evaluate(state, batch).loss - other.evaluate(state, batch).loss
    assert abs(float(difference)) > 0.01


@dataclasses.dataclass(frozen=True)
class Uncounted:
    loss: Callable

    def __call__(self, outputs: PyTree, labels: PyTree) -> tuple:
        return self.loss(outputs, labels)


def test_the_sequential_program_counts_too():
    batch = jax.tree.map(jnp.asarray, make_batch())
    params, stats = sequential.init(LAYERS, batch["inputs"])
    step = sequential.value_and_grad(LAYERS, LOSS, 2, replicas=2)
    (loss, _), gradients, _ = step(params, stats, batch, step_key(0, 0))
    want = jax.value_and_grad(plain_loss)(params, batch)
    assert_trees_close((loss, gradients), want, 1e-5)


def test_weights_of_tokens():
    """Check labels with weights of their own, and metrics that are means over tokens."""
    rng = np.random.default_rng(1)
    batch = make_batch()
    used = batch["labels"] != -100
    tokens = {"labels": batch["labels"], "weights": rng.uniform(0.5, 2, used.shape)}
    batch = {**batch, "labels": tokens}
    pipe = build(D=2, example=batch, loss=losses.token_cross_entropy())
    state = pipe.init(0)
    (loss, metrics), gradients, _ = pipe.value_and_grad(state, batch)
    weights = used * tokens["weights"] * np.asarray(WEIGHTS)[:, None]

    def plain(params: list) -> jax.Array:
        log_p = jax.nn.log_softmax(forward(params, batch["inputs"]))
        of_label = jnp.take_along_axis(log_p, np.maximum(tokens["labels"], 0)[..., None], -1)
        return -(of_label[..., 0] * weights).sum() / weights.sum()

    params = pipe.to_layers(state)
    want = jax.value_and_grad(plain)(params)
    assert_trees_close((loss, pipe.to_layers(gradients)), want, 1e-5)
    right = np.asarray(forward(params, batch["inputs"])).argmax(-1) == tokens["labels"]
    accuracy = (right * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["accuracy"], accuracy, 1e-5)


def test_a_batch_without_tokens(pipe):
    """Check that nothing is learned from it, and nothing is evaluated."""
    batch = make_batch()
    batch["labels"] = np.full_like(batch["labels"], -100)
    state = pipe.init(0)
    value, gradients, _ = pipe.value_and_grad(state, batch)
    assert value.loss == 0
    assert not any(np.any(a) for a in jax.tree.leaves(gradients))
    with pytest.raises(DataError, match="the loss counts nothing in this batch"):
        pipe.evaluate(state, batch)
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    with_and_without = trainer.evaluate(state, [batch, make_batch(), batch])
    assert with_and_without == trainer.evaluate(state, [make_batch()])


def test_evaluation_of_batches_of_any_size(pipe):
    """Check that a mean over several batches is that over all of their tokens."""
    whole = make_batch(3 * N + 5)
    state = pipe.init(0)
    want = float(plain_loss(pipe.to_layers(state), whole))
    assert float(pipe.evaluate(state, whole).loss) == pytest.approx(want, rel=1e-5)
    cuts = [0, 3, 20, 3 * N + 5]
    parts = [jax.tree.map(lambda a, i=i, j=j: a[i:j], whole) for i, j in itertools.pairwise(cuts)]
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    assert trainer.evaluate(state, parts)["test_loss"] == pytest.approx(want, rel=1e-5)


def test_a_part_of_weight_zero(pipe):
    """Check a large batch, of which the first N examples do not count."""
    batch = make_batch(2 * N)
    batch["weights"] = np.where(np.arange(2 * N) < N, 0, batch["weights"])
    state = pipe.init(0)
    want = float(plain_loss(pipe.to_layers(state), batch))
    assert float(pipe.evaluate(state, batch).loss) == pytest.approx(want, rel=1e-5)


def test_a_count_of_another_shape():
    with pytest.raises(gpipe.errors.ArgumentError, match=r"method `count` .* each example, \[4\]"):
        build(loss=WrongCount())


class WrongCount:
    def __call__(self, outputs: PyTree, labels: PyTree) -> jax.Array:
        return jnp.zeros(labels.shape)

    def count(self, labels: jax.Array) -> jax.Array:
        return (labels >= 0).sum()
