"""Losses against numpy, and their weighted sums over examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.losses import (
    classification,
    softmax_cross_entropy,
    squared_error,
)
from gpipe_jax.losses.weighting import counting_rows, weighted_sums


def entropy_in_numpy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("lead", [(4,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_cross_entropy_is_that_of_numpy(lead: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(*lead, 5))).astype(np.float32)
    labels = rng.integers(0, 5, lead)
    losses, metrics = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(losses, entropy_in_numpy(logits, labels), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(-1) == labels)
    assert losses.dtype == metrics["accuracy"].dtype == jnp.float32


def test_no_knowledge_costs_log_of_the_classes() -> None:
    losses, _ = softmax_cross_entropy(jnp.zeros((3, 7)), jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(losses, np.log(7), rtol=1e-6)


def test_cross_entropy_is_computed_in_at_least_float32() -> None:
    logits = jnp.asarray([[10.0, 0.0]], jnp.bfloat16)
    losses, _ = softmax_cross_entropy(logits, jnp.zeros(1, jnp.int32))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log1p(np.exp(-10.0)), rtol=1e-2)
    with jax.enable_x64(True):
        losses, _ = softmax_cross_entropy(jnp.zeros((1, 2), jnp.float64), jnp.zeros(1, int))
        assert losses.dtype == jnp.float64


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_that_is_no_class_makes_nan(smoothing: float) -> None:
    """Take it for no other class, not even in a type that cannot hold the classes."""
    logits = jnp.zeros((6, 200))
    labels = jnp.asarray([1, -1, -128, 127, -100, 0], jnp.int8)
    losses, _ = classification(label_smoothing=smoothing)(logits, labels)
    np.testing.assert_array_equal(np.isnan(losses), np.asarray(labels) < 0)
    losses, _ = classification(label_smoothing=smoothing)(logits[:, :3], labels)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, True, True, False])


def test_an_example_of_weight_zero_counts_nothing_whatever_its_label() -> None:
    def loss(logits: jax.Array) -> jax.Array:
        labels, weights = jnp.array([1, -1]), jnp.array([2.0, 0.0])
        return weighted_sums(softmax_cross_entropy, logits, labels, weights)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3)))
    assert value == pytest.approx(2 * np.log(3))
    np.testing.assert_allclose(gradient, [[2 / 3, -4 / 3, 2 / 3], [0, 0, 0]], rtol=1e-6)


# --- classification ------------------------------------------------------------------------------


def scores(classes: int, seed: int = 0, examples: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, examples)


def smoothed_in_numpy(logits: np.ndarray, labels: np.ndarray, e: float) -> np.ndarray:
    """Compute the cross entropy of (1 - e) onehot + e / classes, class by class."""
    classes = logits.shape[-1]
    wanted = (1 - e) * np.eye(classes)[labels] + e / classes
    every = [entropy_in_numpy(logits, np.full_like(labels, c)) for c in range(classes)]
    return (wanted * np.stack(every, -1)).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothed_labels(smoothing: float) -> None:
    logits, labels = scores(7)
    losses, metrics = classification(label_smoothing=smoothing)(jnp.asarray(logits), labels)
    np.testing.assert_allclose(losses, smoothed_in_numpy(logits, labels, smoothing), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(-1) == labels)
    assert metrics.keys() == {"accuracy"}


def test_without_options_it_is_the_cross_entropy() -> None:
    logits, labels = (jnp.asarray(a) for a in scores(7))
    have, wanted = classification()(logits, labels), softmax_cross_entropy(logits, labels)
    jax.tree.map(np.testing.assert_array_equal, have, wanted)


def test_the_auxiliary_head_counts_with_its_weight_and_has_no_metrics() -> None:
    (main, labels), (side, _) = scores(7), scores(7, seed=1)
    loss = classification(label_smoothing=0.1, auxiliary_weight=0.4)
    losses, metrics = loss((jnp.asarray(main), jnp.asarray(side)), labels)
    parts = [smoothed_in_numpy(logits, labels, 0.1) for logits in (main, side)]
    np.testing.assert_allclose(losses, parts[0] + 0.4 * parts[1], rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], main.argmax(-1) == labels)


@pytest.mark.parametrize("classes", [99, 100, 101])
def test_top_five_from_a_hundred_classes(classes: int) -> None:
    logits, _ = scores(classes)
    ranked = np.argsort(-logits, axis=-1)
    labels = ranked[np.arange(40), np.arange(40) % 10]  # the k-th best, k from 0 to 9
    _, metrics = classification()(jnp.asarray(logits), labels)
    assert ("top5_accuracy" in metrics) == (classes >= 100)
    np.testing.assert_array_equal(metrics["accuracy"], np.arange(40) % 10 == 0)
    if classes >= 100:
        np.testing.assert_array_equal(metrics["top5_accuracy"], np.arange(40) % 10 < 5)
        assert metrics["top5_accuracy"].dtype == jnp.float32


def test_scores_that_say_nothing_are_not_in_the_top_five() -> None:
    """Neither equal scores nor NaN put a label there that is not among the first classes."""
    labels = jnp.full(2, 50)
    for value in (0.0, jnp.nan):
        _, metrics = classification()(jnp.full((2, 100), value), labels)
        np.testing.assert_array_equal(metrics["top5_accuracy"], 0)


def test_equal_arguments_give_equal_losses() -> None:
    """Compiled programs are looked up by the loss function."""
    one, same = (classification(label_smoothing=0.1, auxiliary_weight=0.4) for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != classification(label_smoothing=0.1)
    assert one != classification(label_smoothing=0.2, auxiliary_weight=0.4)


@pytest.mark.parametrize(
    ("weight", "outputs", "said"),
    [
        (0.4, 1, r"0.4 the network must return a pair \(logits, aux.*\), got 1 output; use both"),
        (0.4, 3, r"0.4 the network must return a pair \(logits, aux.*\), got 3 outputs; use both"),
        (0.0, 2, "0.0 the network must return logits alone, got 2 outputs; use both .* or neither"),
    ],
)
def test_outputs_must_go_with_the_weight(weight: float, outputs: int, said: str) -> None:
    logits = jnp.zeros((3, 7))
    given = logits if outputs == 1 else (logits,) * outputs
    with pytest.raises(ValueError, match=said):
        classification(auxiliary_weight=weight)(given, jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_arguments_of_classification(value: float) -> None:
    message = f"`label_smoothing` must be at least 0 and less than 1, got {value}"
    with pytest.raises(ValueError, match=message):
        classification(label_smoothing=value)
    if value != 1.0:
        with pytest.raises(ValueError, match=rf"`auxiliary_weight` is {value}; use 0 .* or more"):
            classification(auxiliary_weight=value)


# --- other losses, and sums ----------------------------------------------------------------------


def test_squared_error_of_every_output() -> None:
    outputs, labels = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[0.0, 2.0], [5.0, 1.0]])
    np.testing.assert_array_equal(squared_error(outputs, labels), [[1, 0], [4, 9]])


def test_labels_of_another_shape_are_not_broadcast() -> None:
    """[B, 1] - [B] would be [B, B]: every output against every label."""
    with pytest.raises(ValueError, match=r"labels have shape \[4\], but outputs \[4, 1\]"):
        squared_error(jnp.zeros((4, 1)), jnp.zeros(4))


def test_the_sum_weighs_examples_and_averages_positions() -> None:
    losses = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    hits = np.asarray([1.0, 0.0, 1.0], np.float32)
    weights = np.asarray([0.5, 2.0, 0.0], np.float32)
    total, metrics = weighted_sums(
        lambda o, y: (jnp.asarray(o), {"hits": jnp.asarray(hits)}),
        losses, None, jnp.asarray(weights),
    )  # fmt: skip
    np.testing.assert_allclose(total, (losses.mean((1, 2)) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["hits"], 0.5)


def test_examples_of_weight_zero_do_not_count() -> None:
    outputs, labels = jnp.asarray([1.0, 5.0]), jnp.asarray([0.0, 0.0])
    total, metrics = weighted_sums(squared_error, outputs, labels, jnp.asarray([1.0, 0.0]))
    assert (float(total), metrics) == (1.0, {})


def test_sums_are_float32_even_of_bfloat16_losses() -> None:
    ones = jnp.ones(300, jnp.bfloat16)
    total, _ = weighted_sums(lambda o, y: o, ones, None, jnp.ones(300, jnp.float32))
    assert total.dtype == jnp.float32 and float(total) == 300  # bfloat16 would stop at 256


@pytest.mark.parametrize(
    ("shape", "said"), [((), r"\[\]"), ((3,), r"\[3\]"), ((1, 4), r"\[1, 4\]")]
)
def test_a_loss_without_the_examples_is_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=rf"an array \[4, ...\]; got shape {said}; do not average"):
        weighted_sums(lambda o, y: jnp.zeros(shape), jnp.zeros(4), None, jnp.ones(4))


def test_a_metric_without_the_examples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \[\]"):
        weighted_sums(lambda o, y: (o, {"mean": o.mean()}), jnp.zeros(4), None, jnp.ones(4))


# --- what a loss may return ----------------------------------------------------------------------

ONES = jnp.ones(4)


def sums_of(result: object) -> tuple[jax.Array, dict]:
    return weighted_sums(lambda o, y: result, None, None, jnp.asarray([0.25, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize(
    "number",
    [2, 2.0, np.float32(2), np.int64(2), jnp.full(4, 2), np.full(4, 2), np.full((4, 3), 2)],
)
def test_a_number_among_the_metrics_is_that_of_each_example(number: object) -> None:
    _, metrics = sums_of((ONES, {"temperature": number}))
    assert metrics["temperature"].dtype == jnp.float32 and float(metrics["temperature"]) == 2


def test_a_bool_among_the_metrics_is_a_number() -> None:
    _, metrics = sums_of((ONES, {"on": True, "off": np.bool_(False)}))
    assert (float(metrics["on"]), float(metrics["off"])) == (1.0, 0.0)


def test_numbers_among_the_metrics_of_a_pipeline() -> None:
    """Check that they do not depend on micro-batches, nor on weights."""

    def loss(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
        return outputs.sum(-1), {"temperature": 0.5, "classes": 3}

    batch = {"inputs": np.ones((6, 4), np.float32), "labels": np.zeros(6, np.int32)}
    pipe = gpipe.Pipeline(
        gpipe.zoo.mlp((4, 3, 3)),
        loss=loss,
        mesh=gpipe.make_mesh(stages=2),
        example=batch,
        micro_batches=3,
    )
    value, _, _ = pipe.value_and_grad(pipe.init(0), {**batch, "weights": [0, 1, 2, 3, 4, 5]})
    assert float(value.metrics["temperature"]) == pytest.approx(0.5)
    assert float(value.metrics["classes"]) == pytest.approx(3)


@pytest.mark.parametrize(
    "result", [ONES, np.ones(4), (ONES, {}), [ONES, {}], (ONES, None), np.ones((4, 2))]
)
def test_losses_alone_or_with_metrics(result: object) -> None:
    total, metrics = sums_of(result)
    assert float(total) == 1 and metrics == {}


PAIR = r"`loss` must return losses \[B, ...\], or a pair \(losses, {name: metric \[B, ...\]}\)"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, PAIR + "; got a NoneType for the losses"),
        ({"loss": ONES}, PAIR + "; got a dict for the losses"),
        ("loss", PAIR + "; got a str for the losses"),
        ([ONES, ONES], PAIR + "; got metrics that are not a dict"),
        ((ONES, 0.5), PAIR + "; got metrics that are not a dict"),
        ((ONES, {3: ONES}), PAIR + "; got metrics that are not a dict by names: {3: "),
        ((ONES, {}, {}), PAIR + "; got a tuple of 3"),
        ([ONES], PAIR + "; got a list of 1"),
        (([ONES], {}), PAIR + "; got a list for the losses"),
        ((ONES, {"hits": {"top": ONES}}), PAIR + "; got a dict for metric 'hits'"),
        ((ONES, {"hits": None}), PAIR + "; got a NoneType for metric 'hits'"),
        (0.5, r"got shape \[\]; do not average over the examples \(the losses\)"),
        ((ONES, {"hits": jnp.ones(())}), r"got shape \[\]; do not average .* \(metric 'hits'\)"),
        (ONES * 1j, r"must return real numbers; got complex64 for the losses; take `abs`"),
    ],
)
def test_what_else_a_loss_returns_is_refused(result: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sums_of(result)


def test_a_loss_that_returns_nothing_has_no_pipeline() -> None:
    with pytest.raises(ValueError, match=r"`loss` .* layer 0, .*: `loss` must return .* NoneType"):
        gpipe.Pipeline(
            gpipe.zoo.mlp((4, 3)),
            loss=lambda outputs, labels: None,
            mesh=gpipe.make_mesh(stages=1),
            example={"inputs": np.ones((6, 4), np.float32), "labels": np.zeros(6, np.int32)},
        )


@pytest.mark.parametrize(
    ("weights", "rows"),
    [([1, 2], [0, 1]), ([0, 0, 3, 0, 1], [2, 2, 2, 2, 4]), ([1e-30, 0, 1], [0, 0, 2])],
)
def test_rows_of_weight_zero_take_the_first_that_counts(weights: list, rows: list) -> None:
    for a in (np.asarray(weights, np.float32), jnp.asarray(weights, jnp.float32)):
        have = counting_rows(a)
        assert isinstance(have, type(a)) and have.tolist() == rows
    assert jax.jit(counting_rows)(a).tolist() == rows
