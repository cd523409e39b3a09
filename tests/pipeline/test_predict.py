"""Outputs for any number of examples, and for other lengths of sequences."""

import jax
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.errors import DataError

WIDTH, LENGTH, N = 4, 6, 8


def kernel(key: jax.Array, x: jax.Array) -> dict:
    return {"w": jax.random.normal(key, (WIDTH, WIDTH))}


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jax.numpy.tanh(x @ params["w"])


def by_length(key: jax.Array, x: jax.Array) -> dict:
    return {"w": jax.random.normal(key, (x.shape[1], WIDTH))}


def add(params: dict, x: jax.Array) -> jax.Array:
    return x + params["w"]


def build(layers: list) -> gpipe.Pipeline:
    x = np.zeros((N, LENGTH, WIDTH), np.float32)
    mesh = gpipe.make_mesh(stages=2, data=2)
    example = {"inputs": x, "labels": x}
    loss = gpipe.losses.squared_error
    return gpipe.Pipeline(layers, loss=loss, mesh=mesh, example=example, micro_batches=2)


@pytest.fixture(scope="module")
def pipe() -> gpipe.Pipeline:
    return build([gpipe.layer(kernel, dense)] * 3)


def test_any_number_of_examples_and_lengths_compile_once(pipe):
    state, compiled = pipe.init(0), pipe._predictor._outputs
    for length, programs in [(LENGTH, 1), (3, 2), (LENGTH, 2), (3, 2)]:
        for examples in (1, N, 2 * N + 3):
            x = np.random.default_rng(0).normal(size=(examples, length, WIDTH))
            want = x = x.astype(np.float32)
            for p in pipe.to_layers(state):
                want = np.tanh(want @ p["w"])
            np.testing.assert_allclose(pipe.predict(state, x), want, atol=1e-5)
        assert compiled._cache_size() == programs


def test_parameters_of_another_shape_are_refused():
    pipe = build([gpipe.layer(kernel, dense), gpipe.layer(by_length, add)])
    with pytest.raises(
        DataError, match=r"layer 1, .* has parameters .*change only axes that no pa"
    ):
        pipe.predict(pipe.init(0), np.zeros((2, 3, WIDTH), np.float32))


def test_inputs_of_another_structure_are_refused(pipe):
    with pytest.raises(DataError, match="structure"):
        pipe.predict(pipe.init(0), {"x": np.zeros((2, LENGTH, WIDTH))})
