"""The plain program: shapes, keys, and a step that any number of micro-batches leaves alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax import keys, losses, sequential, zoo
from gpipe_jax.layers.dense import Dense
from gpipe_jax.layers.layer import layer
from gpipe_jax.layers.shapes import describe, infer_shapes

PyTree = Any
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


def made(seed: int = 0) -> list[PyTree]:
    return jax.jit(lambda: sequential.init(LAYERS, X, seed))()


# ---- shapes -------------------------------------------------------------------------------------


def test_shapes_of_every_layer() -> None:
    shapes = infer_shapes(LAYERS, X)
    assert [s.input.shape for s in shapes] == [(2, 3), (2, 8), (2, 8)]
    assert [s.output.shape for s in shapes] == [(2, 8), (2, 8), (2, 4)]
    assert [s.params["linear"]["kernel"].shape for s in shapes] == [(3, 8), (8, 8), (8, 4)]
    assert [s.layer for s in shapes] == LAYERS
    assert all(
        isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves([s[1:] for s in shapes])
    )


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


# ---- keys ---------------------------------------------------------------------------------------


def test_parameters_depend_on_the_seed_and_the_layers_place_only() -> None:
    kernel = made(seed=5)[1]["linear"]["kernel"]
    alone = jax.jit(LAYERS[1].init)(keys.layer_key(5, 1), jnp.ones((2, 8)))
    np.testing.assert_array_equal(kernel, alone["linear"]["kernel"])
    assert not np.array_equal(kernel, made(seed=6)[1]["linear"]["kernel"])


def test_all_keys_differ() -> None:
    """Of layers, of steps, and of every (step, layer, micro-batch)."""
    all_keys = [keys.layer_key(seed, i) for seed in (0, 1) for i in range(3)]
    steps = [keys.step_key(seed, s) for seed in (0, 1) for s in range(3)]
    all_keys += steps
    all_keys += [keys.apply_key(s, i, m) for s in steps for i in range(3) for m in range(3)]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in all_keys}
    assert len(data) == len(all_keys)


def test_every_layer_and_micro_batch_draws_its_own_numbers() -> None:
    layers, key = [layer(Noise)] * 2, jax.random.key(0)
    x = jnp.zeros((1, 1))
    draw = lambda m: float(  # noqa: E731
        sequential.forward(layers, [{}, {}], x, key, m, train=True)[0, 0]
    )
    alone = [
        float(layers[i].apply({}, x, keys.apply_key(key, i, 1), train=True)[0, 0]) for i in (0, 1)
    ]
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
    (loss, metrics), grads = jax.jit(step)(params, batch, jax.random.key(0))
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
    (_, metrics), _ = jax.jit(step)(params, batch, jax.random.key(0))
    scores = jax.jit(
        lambda x: sequential.forward(LAYERS, params, x, jax.random.key(0), train=True)
    )(batch["inputs"])
    hits, w = np.asarray(scores.argmax(-1) == batch["labels"]), np.asarray(batch["weights"])
    np.testing.assert_allclose(metrics["accuracy"], (hits * w).sum() / w.sum(), rtol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_recomputes_and_its_absence_does_not(remat: bool) -> None:
    batch = make_batch(4)
    params = made()
    step = sequential.value_and_grad(LAYERS, losses.softmax_cross_entropy, 2, remat=remat)
    text = str(jax.make_jaxpr(step)(params, batch, jax.random.key(0)))
    assert ("remat" in text or "checkpoint" in text) == remat


def test_describe_writes_shapes_in_one_line() -> None:
    tree = {"x": jnp.zeros((4, 8)), "n": (jnp.zeros((), jnp.int32),)}
    assert describe(tree) == "{n: (int32[],), x: float32[4,8]}"
