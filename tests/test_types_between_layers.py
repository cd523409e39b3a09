"""Check that what passes between layers has the inferred types, wherever the network is cut."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer

HALF = jnp.bfloat16
RNG = np.random.default_rng(0)
BATCH = {
    "inputs": RNG.normal(size=(8, 8)).astype(np.float32),
    "labels": RNG.normal(size=(8, 4)).astype(np.float32),
}
EIGHT = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def weights(n: int, m: int) -> Any:
    def init(key: jax.Array, x: Any) -> dict:
        return {"w": jax.random.normal(key, (n, m)) / n**0.5, "scale": jnp.asarray(0.5)}

    return init


def wide(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) * params["scale"]


def masked(params: dict, x: jax.Array) -> tuple:
    """Return a weakly typed mask beside bfloat16."""
    return wide(params, x).astype(HALF), jnp.where(x[:, :1] > 0, 1.0, 0.5)


def multiply(params: dict, pair: tuple) -> tuple:
    x, mask = pair
    return (x @ params["w"].astype(HALF)) * mask, mask


def end(params: dict, pair: tuple) -> jax.Array:
    x, mask = pair
    return x.astype(jnp.float32) @ params["w"] * mask


def network(first: Any = masked) -> list[Layer]:
    """Return layers whose boundaries are packed, with room for a leaf of another type."""
    return [
        layer(weights(8, 64), wide),
        layer(weights(64, 8), first),
        layer(weights(8, 8), multiply),
        layer(weights(8, 4), end),
    ]


def pipeline(layers: list[Layer], stages: int, **options: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=stages),
        micro_batches=2,
        example=BATCH,
        **options,
    )


def plain(layers: list[Layer], params: Any, stats: Any) -> tuple:
    """Return what a step and an evaluation of the sequential program give."""
    step = sequential.value_and_grad(layers, gpipe.losses.squared_error, 2)
    batch = {**jax.tree.map(jnp.asarray, BATCH), "weights": jnp.ones(8)}
    (loss, _), grads, stats = jax.jit(step)(params, stats, batch, step_key(0, 0))
    x, key = batch["inputs"], jax.random.key(0)
    outputs, _ = sequential.forward(layers, params, stats, x, key, train=False)
    return loss, grads, stats, outputs


@pytest.mark.parametrize(
    ("stages", "remat"),
    [(4, "stage"), *[pytest.param(K, "layer", marks=pytest.mark.slow) for K in (1, 2, 4)]],
)
def test_weakly_typed_leaves_are_right_for_any_cut(stages: int, remat: str) -> None:
    layers = network()
    pipe = pipeline(layers, stages, remat=remat)
    state = pipe.init(seed=0)
    params = pipe.to_layers(state)
    loss, grads, _, outputs = plain(layers, params, pipe.statistics(state))
    (own_loss, _), own_grads, _ = pipe.value_and_grad(state, BATCH)
    # bfloat16 is rounded in other places; a leaf in the wrong array is off by 1.6.
    assert_trees_close(own_loss, loss, 1e-2)
    assert_trees_close(pipe.to_layers(own_grads), grads, 3e-2)
    assert_trees_close(pipe.predict(state, BATCH["inputs"]), outputs, 2e-2)
    np.testing.assert_allclose(pipe.evaluate(state, BATCH)[0], own_loss, rtol=1e-2)


def test_all_inferred_types_are_strong() -> None:
    shapes = infer_shapes(network(), EIGHT)
    arrays = [(s.input, s.output, s.params, s.stats, s.fixed, s.borrowed) for s in shapes]
    leaves = jax.tree.leaves(arrays)
    assert leaves and not any(a.weak_type for a in leaves)
    x, mask = shapes[2].output
    assert (x.dtype, mask.dtype) == (jnp.float32, jnp.float32)  # of bfloat16 and a strong mask


def test_a_layer_that_takes_the_progress_gets_it_in_the_type_of_a_step() -> None:
    def fade(params: dict, x: jax.Array, progress: Any) -> jax.Array:
        return x.astype(HALF) * progress

    shapes = infer_shapes([layer(weights(8, 8), fade)], EIGHT)
    assert shapes[0].output.dtype == jnp.float32
    pipe = pipeline([layer(weights(8, 8), fade), layer(weights(8, 4), wide)], 2, steps=4)
    assert np.isfinite(pipe.value_and_grad(pipe.init(seed=0), BATCH)[0][0])


@pytest.mark.parametrize("value", [0.5, 3, True, np.float32(0.5), np.int64(3)])
def test_numbers_in_an_output_are_arrays(value: Any) -> None:
    def number(params: dict, x: jax.Array) -> tuple:
        return wide(params, x), value

    def array(params: dict, x: jax.Array) -> tuple:
        return wide(params, x), jnp.asarray(value, jax.dtypes.canonicalize_dtype(type(value)))

    outputs = []
    for first in (number, array):
        pipe = pipeline([layer(weights(8, 8), first), layer(weights(8, 4), end)], 2)
        outputs.append(pipe.predict(pipe.init(seed=0), BATCH["inputs"]))
    np.testing.assert_array_equal(*outputs)


def test_numpy_arrays_of_float64_in_an_output_keep_their_place() -> None:
    def table(params: dict, x: jax.Array) -> tuple:
        return wide(params, x).astype(HALF), np.full((len(x), 1), 0.5)

    pipe = pipeline(network(table), 4)
    state = pipe.init(seed=0)
    outputs = plain(network(table), pipe.to_layers(state), pipe.statistics(state))[-1]
    assert_trees_close(pipe.predict(state, BATCH["inputs"]), outputs, 2e-2)


@pytest.mark.parametrize(
    ("value", "name"), [("train", "'train' of type str"), (2**80, "of type int")]
)
def test_other_values_in_an_output_are_refused(value: Any, name: str) -> None:
    def text(params: dict, x: jax.Array) -> dict:
        return {"x": x, "mode": value}

    message = (
        rf"layer 1, .*text, returns .*{name} at output\['mode'\]; .* only arrays and small numbers"
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes([layer(weights(8, 8), wide), layer(weights(8, 8), text)], EIGHT)


@dataclass(frozen=True)
class Half(Layer):
    """Have running statistics in bfloat16, and compute with them in float32."""

    def init(self, key: jax.Array, x: jax.Array) -> dict:
        return {"w": jnp.eye(8)}

    def init_statistics(self) -> dict:
        return {"mean": jnp.zeros(8, HALF)}

    def apply(self, params: dict, stats: dict, x: jax.Array, context: Context) -> tuple:
        mean = x.mean(0)
        y = (x - (mean if context.train else stats["mean"])) @ params["w"]
        return y, {"mean": mean} if context.train else {}

    def commit(self, stats: dict, moments: dict) -> dict:
        return {"mean": 0.9 * stats["mean"].astype(jnp.float32) + 0.1 * moments["mean"]}


def test_statistics_keep_their_types_and_moments_are_summed_in_float32() -> None:
    layers = [Half(), Half(), layer(weights(8, 4), wide)]
    pipe = pipeline(layers, 2)
    state = pipe.init(seed=0)
    expected = plain(layers, pipe.to_layers(state), pipe.statistics(state))
    _, _, after = pipe.value_and_grad(state, BATCH)
    assert [a.dtype for a in jax.tree.leaves(after.stats)] == [HALF] * len(
        jax.tree.leaves(state.stats)
    )
    for own, other in zip(pipe.statistics(after), expected[2], strict=True):
        assert jax.tree.map(lambda a: a.dtype, own) == jax.tree.map(lambda a: a.dtype, other)
        assert_trees_close(jax.tree.map(jnp.float32, own), jax.tree.map(jnp.float32, other), 1e-2)


@dataclass(frozen=True)
class Untrue(Layer):
    """Say other shapes than those of its parameters."""

    def init(self, key: jax.Array, x: jax.Array) -> dict:
        return {"w": jnp.zeros((8, 4), HALF)}

    def shapes(self, x: Any) -> tuple:
        return {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, {}

    def apply(self, params: dict, stats: dict, x: jax.Array, context: Context) -> tuple:
        return x @ params["w"], {}


def test_parameters_of_other_types_than_said_are_refused() -> None:
    pipe = pipeline([layer(weights(8, 8), wide), Untrue()], 2)
    message = (
        r"layer Untrue\(.* makes the parameters {w: bfloat16\[8,4\]}, but its `shapes` returns "
        r"{w: float32\[8,4\]}; make the two agree"
    )
    with pytest.raises(ValueError, match=message):
        pipe.init(seed=0)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_convolutions_and_batch_norm_train_with_mixed_types_under_x64(dtype: str) -> None:
    """Kernels are float64 there, and the statistics of `nnx.BatchNorm` float32."""
    images = RNG.normal(size=(8, 4, 4, 1)).astype(dtype)
    batch = {"inputs": images, "labels": np.arange(8) % 4}
    with jax.enable_x64(True):
        layers = gpipe.zoo.convnet((4,), (1,), classes=4)
        loss = gpipe.losses.softmax_cross_entropy
        mesh = gpipe.make_mesh(stages=2)
        pipe = gpipe.Pipeline(layers, loss=loss, mesh=mesh, micro_batches=2, example=batch)
        state = pipe.init(seed=0)
        step = jax.jit(sequential.value_and_grad(layers, loss, 2))
        both = {**jax.tree.map(jnp.asarray, batch), "weights": jnp.ones(8)}
        expected = step(pipe.to_layers(state), pipe.statistics(state), both, step_key(0, 0))
        value, grads, after = pipe.value_and_grad(state, batch)
        assert_trees_close(tuple(value), jax.device_get(expected[0]), 1e-5)
        assert_trees_close(pipe.to_layers(grads), jax.device_get(expected[1]), 1e-5)
        assert_trees_close(pipe.statistics(after), jax.device_get(expected[2]), 1e-5)
