"""Test the plain program: shapes, keys, and a step that is equal for all micro-batches.

And what pipelines are compared with: statistics, links, progress and keys of examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax import losses, sequential, zoo
from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.layers import random_keys
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.shape_inference import count_parameters, infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.trees import PyTree, describe
from gpipe_jax.zoo.basic import Dense

LAYERS = zoo.mlp((3, 8, 8, 4))
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class Noise(nnx.Module):
    """Adds a number drawn from the layer's key."""

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return x + jax.random.normal(rngs())


class Fork(nnx.Module):
    def __call__(self, x: jax.Array) -> dict:
        return {"x": x, "skip": (x[:, :1],)}


def make_batch(examples: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        "inputs": jnp.asarray(rng.normal(size=(examples, 3)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, 4, examples)),
        "weights": jnp.asarray([0.0, *rng.uniform(0.5, 2, examples - 1)], jnp.float32),
    }


def init_matrix(key: jax.Array, x: PyTree) -> dict:
    width = jax.tree.leaves(x)[0].shape[-1]
    return {"w": jax.random.normal(key, (width, width))}


def apply_matrix(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"])


def plain() -> Layer:
    return layer(init_matrix, apply_matrix)


def linked_layers() -> list[Layer]:
    """tanh(x w), kept; tanh(. v); minus what was kept; tanh(. w) with the first layer's w."""

    def keep(params: dict, x: jax.Array) -> tuple:
        return apply_matrix(params, x), 2 * x

    def subtract(params: dict, pair: tuple) -> jax.Array:
        return pair[0] - pair[1]

    return [
        layer(init_matrix, keep).stash("a").tie("w", "w"),
        plain(),
        layer(lambda key, x: {}, subtract).pop("a"),
        plain().tie("w", "w"),
    ]


NONE = [{}] * len(LAYERS)  # running statistics


@functools.cache
def made(seed: int = 0) -> list[PyTree]:
    params, stats = jax.jit(lambda: sequential.init(LAYERS, X, seed))()
    assert stats == NONE
    return params


# ---- shapes -------------------------------------------------------------------------------------


def test_shapes_of_every_layer() -> None:
    shapes = infer_shapes(LAYERS, X)
    assert [s.input.shape for s in shapes] == [(2, 3), (2, 8), (2, 8)]
    assert [s.output.shape for s in shapes] == [(2, 8), (2, 8), (2, 4)]
    assert [s.params["linear"]["kernel"].shape for s in shapes] == [(3, 8), (8, 8), (8, 4)]
    assert [s.layer for s in shapes] == LAYERS
    arrays = [(s.input, s.output, s.params, s.stats, s.fixed) for s in shapes]
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(arrays))


def test_equal_layers_are_traced_once() -> None:
    traced = []

    def init(key: jax.Array, x: jax.Array) -> dict:
        traced.append(x.shape)
        return {}

    one = layer(init, lambda params, x: x)
    assert len(infer_shapes([one] * 6, X)) == 6
    assert traced == [(2, 3)]


def test_layers_that_do_not_fit_are_named_with_the_shapes() -> None:
    layers = [*zoo.mlp((3, 8, 5)), layer(Dense, in_features=6, out_features=2)]
    with pytest.raises(ValueError) as caught:
        infer_shapes(layers, X)
    message = str(caught.value)
    assert message.startswith("layer 2, Dense(in_features=6, out_features=2), does not take")
    assert "the output of layer 1, Dense(in_features=8, last=True, out_features=5): " in message
    assert "float32[2,5]" in message and "make the two agree (" in message


def test_an_input_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"layer 0, Dense\(.*\), .*network's inputs: float32\[2,9"):
        infer_shapes(LAYERS, jax.ShapeDtypeStruct((2, 9), jnp.float32))


def test_a_tree_that_does_not_fit_is_described_leaf_by_leaf() -> None:
    with pytest.raises(
        ValueError, match=r"layer 0, Fork\(\): {skip: \(float32\[2,1\],\), x: float"
    ):
        infer_shapes([layer(Fork), *LAYERS], X)


def test_an_output_that_training_changes_is_refused() -> None:
    def apply(params: dict, x: jax.Array, train: bool) -> jax.Array:
        return x if train else x[:, 0]

    message = (
        r"layer 1, .*apply, returns float32\[2,3\] in training but float32\[2\] in evaluation; "
        r"make the two agree"
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes([plain(), layer(lambda key, x: {}, apply)], X)


def test_a_parameter_of_integers_is_refused() -> None:
    one = layer(lambda key, x: {"w": {"ids": jnp.arange(3)}}, lambda params, x: x)
    message = (
        r"layer 1, .* has the parameter \['w'\]\['ids'\] of type int32, which cannot be trained"
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes([plain(), one], X)


def test_shapes_of_linked_layers() -> None:
    """Inputs are with what is popped, outputs with what is stashed, boundaries with what waits."""
    shapes = infer_shapes(linked_layers(), X)
    assert [describe(s.input) for s in shapes] == [
        "float32[2,3]", "float32[2,3]", "(float32[2,3], float32[2,3])", "float32[2,3]"
    ]  # fmt: skip
    assert [describe(s.output) for s in shapes] == [
        "(float32[2,3], float32[2,3])", "float32[2,3]", "float32[2,3]", "float32[2,3]"
    ]  # fmt: skip
    assert [list(s.boundary.skips) for s in shapes] == [[], ["a"], ["a"], []]
    assert [describe(s.params) for s in shapes] == [
        "{w: float32[3,3]}", "{w: float32[3,3]}", "{}", "{w: None}"
    ]  # fmt: skip
    assert [list(s.borrowed) for s in shapes] == [[], [], [], ["w"]]
    assert describe(shapes[3].borrowed) == "{w: float32[3,3]}"


def test_tied_parameters_count_once() -> None:
    x = jnp.zeros((7, 3))
    assert count_parameters(linked_layers(), x) == 9 + 9
    assert count_parameters([plain(), plain(), plain()], x) == 3 * 9
    assert count_parameters(LAYERS, X) == (3 * 8 + 8) + (8 * 8 + 8) + (8 * 4 + 4)


# ---- keys ---------------------------------------------------------------------------------------


def test_parameters_depend_on_the_seed_and_the_layers_place_only() -> None:
    kernel = made(seed=5)[1]["linear"]["kernel"]
    alone = jax.jit(LAYERS[1].init)(random_keys.layer_key(5, 1), jnp.ones((2, 8)))
    np.testing.assert_array_equal(kernel, alone["linear"]["kernel"])
    assert not np.array_equal(kernel, made(seed=6)[1]["linear"]["kernel"])


def test_every_layer_and_micro_batch_draws_its_own_numbers() -> None:
    layers, key = [layer(Noise)] * 2, jax.random.key(0)
    x = jnp.zeros((1, 1))

    def draw(m: int) -> float:
        y, _ = sequential.forward(layers, [{}, {}], [{}, {}], x, key, m, train=True)
        return float(y[0, 0])

    contexts = [Context(random_keys.apply_key(key, i, 1), train=True) for i in (0, 1)]
    alone = [float(layer(Noise).apply({}, {}, x, context)[0][0, 0]) for context in contexts]
    assert draw(1) == pytest.approx(sum(alone)) and alone[0] != alone[1]
    assert draw(0) != draw(1)


# ---- the step -----------------------------------------------------------------------------------


def plain_loss(params: list, batch: dict) -> jax.Array:
    """Weighted mean over the batch, in one go and without any of `sequential`."""
    x = batch["inputs"]
    for i, p in enumerate(params):
        x = x @ p["linear"]["kernel"] + p["linear"]["bias"][None]
        x = x if i == len(params) - 1 else jax.nn.gelu(x)
    log_p = jax.nn.log_softmax(x)
    chosen = jnp.take_along_axis(log_p, batch["labels"][:, None], axis=1)[:, 0]
    return -(chosen * batch["weights"]).sum() / batch["weights"].sum()


@pytest.mark.parametrize(("micro_batches", "remat"), [(1, False), (3, False), (12, True)])
def test_value_and_gradients_are_those_of_the_whole_batch(micro_batches: int, remat: bool) -> None:
    batch = make_batch(12)
    params = made()
    step = sequential.value_and_grad(
        LAYERS, losses.softmax_cross_entropy, micro_batches, remat=remat
    )
    (loss, metrics), grads, stats = jax.jit(step)(params, NONE, batch, jax.random.key(0))
    assert stats == NONE
    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain_loss))(params, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert set(metrics) == {"accuracy"} and 0 <= float(metrics["accuracy"]) <= 1
    assert jax.tree.structure(grads) == jax.tree.structure(wanted_grads)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
        assert np.abs(b).max() > 1e-3, "a gradient of zero would prove nothing"
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def test_accuracy_is_the_weighted_mean() -> None:
    batch = make_batch(6)
    params = made()
    step = sequential.value_and_grad(LAYERS, losses.softmax_cross_entropy, 3)
    (_, metrics), _, _ = jax.jit(step)(params, NONE, batch, jax.random.key(0))
    scores, moments = jax.jit(
        lambda x: sequential.forward(LAYERS, params, NONE, x, jax.random.key(0), train=True)
    )(batch["inputs"])
    assert moments == NONE
    hits, w = np.asarray(scores.argmax(-1) == batch["labels"]), np.asarray(batch["weights"])
    np.testing.assert_allclose(metrics["accuracy"], (hits * w).sum() / w.sum(), rtol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_recomputes_and_its_absence_does_not(remat: bool) -> None:
    batch = make_batch(4)
    params = made()
    step = sequential.value_and_grad(LAYERS, losses.softmax_cross_entropy, 2, remat=remat)
    text = str(jax.make_jaxpr(step)(params, NONE, batch, jax.random.key(0)))
    assert ("remat" in text or "checkpoint" in text) == remat


def test_describe_writes_shapes_in_one_line() -> None:
    tree = {"x": jnp.zeros((4, 8)), "n": (jnp.zeros((), jnp.int32),)}
    assert describe(tree) == "{n: (int32[],), x: float32[4,8]}"


# ---- links, statistics, progress, keys of examples ----------------------------------------------


def test_linked_layers_are_what_they_mean() -> None:
    """Write out a network with one skip and one shared matrix, and its gradients."""
    batch = make_batch(6)
    batch["labels"] = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)
    params, stats = sequential.init(linked_layers(), X, seed=1)
    assert params[3] == {"w": None}, "the first layer keeps what is tied"
    step = sequential.value_and_grad(linked_layers(), losses.squared_error, 2)
    (loss, _), grads, _ = jax.jit(step)(params, stats, batch, jax.random.key(0))

    def written_out(w: jax.Array, v: jax.Array) -> jax.Array:
        x, weights = batch["inputs"], batch["weights"]
        y = jnp.tanh((jnp.tanh(jnp.tanh(x @ w) @ v) - 2 * x) @ w)
        return (((y - batch["labels"]) ** 2).mean(1) * weights).sum() / weights.sum()

    wanted, (d_w, d_v) = jax.value_and_grad(written_out, (0, 1))(params[0]["w"], params[1]["w"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert grads[2:] == [{}, {"w": None}]
    np.testing.assert_allclose(grads[0]["w"], d_w, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(grads[1]["w"], d_v, rtol=2e-5, atol=2e-6)


class Normed(nnx.Module):
    def __init__(self, axis: str | None = None, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.75, axis_name=axis, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


@pytest.mark.parametrize(("axis", "together"), [(None, 4), (DATA, 8)])
def test_batch_norm_sees_a_micro_batch_and_keeps_the_statistics_of_the_batch(
    axis: str | None, together: int
) -> None:
    """24 examples, 3 micro-batches, 2 replicas: 4 examples are normalised at a time, or 8."""
    layers, rng = [layer(Normed, axis=axis)], np.random.default_rng(0)
    x, labels = rng.normal(2.0, 3.0, (24, 3)), rng.normal(size=(24, 3))
    batch = {"inputs": x, "labels": labels, "weights": np.ones(24)}
    batch = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), batch)
    params, stats = sequential.init(layers, batch["inputs"][:1])
    step = sequential.value_and_grad(layers, losses.squared_error, 3, replicas=2)
    (loss, _), _, stats = jax.jit(step)(params, stats, batch, jax.random.key(0))
    groups = x.reshape(-1, together, 3)
    normed = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    wanted = ((normed.reshape(24, 3) - labels) ** 2).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    mean, variance = x.mean(0), x.var(0)  # of all examples, however they are normalised
    np.testing.assert_allclose(stats[0]["norm"]["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats[0]["norm"]["var"], 0.75 + 0.25 * variance, rtol=1e-5)


def test_layers_are_told_the_progress_of_training() -> None:
    one = layer(lambda key, x: {}, lambda params, x, progress: x * progress)
    batch = {"inputs": jnp.ones((2, 1)), "labels": jnp.zeros((2, 1)), "weights": jnp.ones(2)}
    step = jax.jit(sequential.value_and_grad([one], losses.squared_error))
    for told, wanted in (((0.5,), 0.25), ((), 1.0)):
        (loss, _), _, _ = step([{}], [{}], batch, jax.random.key(0), *told)
        assert float(loss) == wanted


@pytest.mark.parametrize(("M", "D"), [(3, 1), (1, 3), (2, 3), (12, 1)])
def test_keys_of_examples_do_not_depend_on_the_micro_batches(M: int, D: int) -> None:
    """Give every example a mask of its own place; masks of micro-batches differ."""
    one = layer(lambda key, x: {}, lambda params, x, rngs: x * jax.random.normal(rngs, x.shape))
    batch = {"inputs": jnp.ones((12, 4)), "labels": jnp.zeros((12, 4)), "weights": jnp.ones(12)}

    def loss(keys_per: str, M: int, D: int) -> float:
        step = sequential.value_and_grad(
            [one], losses.squared_error, M, replicas=D, keys_per=keys_per
        )
        return float(jax.jit(step)([{}], [{}], batch, jax.random.key(0))[0][0])

    assert loss("example", M, D) == pytest.approx(loss("example", 1, 1), rel=1e-6)
    assert abs(loss("micro_batch", M, D) - loss("micro_batch", 1, 1)) > 1e-3
