"""Check caches whose results depend on JAX settings: types of parameters, random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.layers.numeric_settings import cached_by_settings, numeric_settings
from gpipe_jax.layers.random_keys import apply_key, step_key
from gpipe_jax.layers.sources.describe import layer


class InDefaultType(nnx.Module):
    """Hold a parameter in JAX's default type of floating-point numbers."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.normal()(rngs.params(), (3, 3)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...]


def test_the_types_of_a_layer_are_those_of_the_settings_now() -> None:
    one = layer(InDefaultType)
    with jax.enable_x64(True):
        assert one.shapes(None)[0]["kernel"].dtype == jnp.float64
    assert one.shapes(None)[0]["kernel"].dtype == jnp.float32


def test_a_float32_pipeline_is_built_and_run_after_float64_work() -> None:
    """Hold what a notebook does that switches `jax_enable_x64` off again."""
    x = np.random.default_rng(0).normal(size=(4, 3))

    def loss() -> jax.Array:
        pipe = gpipe.Pipeline(
            [layer(InDefaultType)] * 2,
            loss=gpipe.losses.squared_error,
            mesh=gpipe.make_mesh(stages=2),
            micro_batches=2,
            example={"inputs": x, "labels": x},
        )
        state = pipe.from_layers(pipe.to_layers(pipe.init(seed=0)))
        return pipe.value_and_grad(state, {"inputs": x, "labels": x})[0][0]

    with jax.enable_x64(True):
        double = loss()
    single = loss()
    assert (double.dtype, single.dtype) == (jnp.float64, jnp.float32)


def test_a_pipeline_is_refused_under_another_setting() -> None:
    x = np.ones((4, 3), np.float32)
    pipe = gpipe.Pipeline(
        [layer(InDefaultType)] * 2,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=2),
        example={"inputs": x, "labels": x},
    )
    state = pipe.init(seed=0)
    pipe.predict(state, x)
    params = pipe.to_layers(state)
    for use in (
        lambda: pipe.init(seed=0),
        lambda: pipe.from_layers(params),
        lambda: pipe.predict(state, x),
        pipe.lower,
    ):
        message = "`jax_enable_x64` is True, but was False .*set it back, or build a pipeline anew"
        with jax.enable_x64(True), pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_default_matmul_precision", "highest"),
        ("jax_default_prng_impl", "rbg"),
    ],
)
def test_each_setting_has_results_of_its_own(name: str, value: object) -> None:
    calls = []

    @cached_by_settings(maxsize=8)
    def square(x: int) -> int:
        calls.append(x)
        return x * x

    before, old = numeric_settings(), getattr(jax.config, name)
    assert square(3) == square(3) == 9 and calls == [3]
    jax.config.update(name, value)
    try:
        assert numeric_settings() != before
        assert square(3) == square(3) == 9 and calls == [3, 3]
    finally:
        jax.config.update(name, old)
    assert square(3) == 9 and calls == [3, 3]
    square.cache_clear()
    assert square(3) == 9 and calls == [3, 3, 3]


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_keys_of_examples_depend_on_their_places_with_any_generator(generator: str) -> None:
    """Check M = 2, B = 4 against M = 4, B = 2."""
    with jax.default_prng_impl(generator):
        few, many = (
            np.concatenate(
                [
                    jax.random.normal(apply_key(step_key(0, 1), 2, m, B), (B, 3))
                    for m in range(8 // B)
                ]
            )
            for B in (4, 2)
        )
    np.testing.assert_array_equal(few, many)
    assert len(np.unique(few)) == few.size
