"""The convolution's own gradients against JAX's; they are what runs on CPU, and only there."""

import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gpipe_jax.layers import conv
from gpipe_jax.layers.layer import Layer, layer

# (height, width): even, odd, unequal, and smaller than the kernel.
SIZES = [(8, 8), (7, 7), (5, 2)]
CASES = [*itertools.product(SIZES, (1, 3, 5), (1, 2)), ((6, 7), 2, 3)]


@pytest.mark.parametrize(("size", "kernel", "stride"), CASES)
def test_value_and_gradients_are_those_of_jax(
    size: tuple[int, int], kernel: int, stride: int
) -> None:
    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=numbers)

    def both(x: jax.Array, w: jax.Array, dy: jax.Array) -> list[tuple]:
        pulls = [jax.vjp(f, x, w) for f in (lambda x, w: conv.conv2d(x, w, stride), plain)]
        return [(y, *pull(dy)) for y, pull in pulls]

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(kernel, kernel, 3, 4))
        dy = rng.normal(size=jax.eval_shape(plain, x, w).shape)
        ours, wanted = jax.jit(both)(x, w, dy)
    for name, a, b in zip(("value", "dx", "dkernel"), ours, wanted, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


def test_gradients_keep_the_dtype_of_what_they_are_of() -> None:
    x, w = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        y: jax.Array = conv.conv2d(x, w)  # type: ignore[assignment]
        return y.astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def gradients_in_a_scan(function: Callable) -> Callable:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple:
            y = function(c, w, 1)
            return y, (y**2).sum()

        return lax.scan(body, x, None, length=3)[1].sum()

    return jax.jit(jax.grad(loss, (0, 1)))


ARRAYS = (jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4)))


def convolution_layouts(function: Callable) -> list[str]:
    text = gradients_in_a_scan(function).lower(*ARRAYS).compile().as_text()
    return re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)


def test_inside_a_scan_every_convolution_is_in_the_layout_that_cpu_computes_fast() -> None:
    """XLA:CPU calls Eigen for b01f_01io->b01f only, and else runs loops tens of times slower."""
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA:CPU")
    assert set(convolution_layouts(conv.conv2d)) == {"b01f_01io->b01f"}
    plain = convolution_layouts(conv._plain)
    assert len(plain) == 3 and len(set(plain)) == 3  # what the custom gradients are there to avoid


def test_other_platforms_use_their_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A marker planted in the CPU form shows in the program for CPU and not in that for TPU."""

    def marked(*args: object) -> tuple[jax.Array, jax.Array]:
        dx, dw = original(*args)  # type: ignore[arg-type]
        return dx + 4321.0, dw

    original = conv._canonical_gradients
    monkeypatch.setattr(conv, "_canonical_gradients", marked)
    traced = gradients_in_a_scan(conv.conv2d).trace(*ARRAYS)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")}
    assert "4.321" in text["cpu"] and "4.321" not in text["tpu"]


LAYERS: list[tuple[Layer, tuple[int, ...], tuple[int, ...]]] = [
    (layer(conv.Conv, in_features=3, out_features=5), (2, 7, 6, 3), (2, 7, 6, 5)),
    (layer(conv.Conv, in_features=3, out_features=5, stride=2), (2, 7, 6, 3), (2, 4, 3, 5)),
    (layer(conv.ConvStem, in_features=1, features=16), (2, 6, 6, 1), (2, 6, 6, 16)),
    (layer(conv.ResidualBlock, in_features=4, features=4), (2, 6, 6, 4), (2, 6, 6, 4)),
    (layer(conv.ResidualBlock, in_features=4, features=8, stride=2), (2, 7, 6, 4), (2, 4, 3, 8)),
    (layer(conv.ConvHead, in_features=4, classes=10), (2, 6, 6, 4), (2, 10)),
]


@pytest.mark.parametrize(("one", "shape", "wanted"), LAYERS, ids=[str(case[0]) for case in LAYERS])
def test_shapes_of_the_convolution_layers(
    one: Layer, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.random.key(0)
    params = jax.eval_shape(one.init, key, x)
    y = jax.eval_shape(lambda p, x: one.apply(p, x, key, train=True), params, x)
    assert y.shape == wanted


def test_a_residual_block_of_equal_shapes_has_no_shortcut_weights() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
    same = layer(conv.ResidualBlock, in_features=4, features=4)
    wider = layer(conv.ResidualBlock, in_features=4, features=8)
    key = jax.random.key(0)
    assert "shortcut" not in jax.eval_shape(same.init, key, x)
    assert "shortcut" in jax.eval_shape(wider.init, key, x)


def test_a_residual_block_adds_its_input() -> None:
    one, x = LAYERS[3][0], jax.random.normal(jax.random.key(0), (1, 4, 4, 4))

    @jax.jit
    def silent(x: jax.Array) -> jax.Array:
        params = one.init(jax.random.key(1), x)
        params["conv2"]["kernel"] = jnp.zeros_like(params["conv2"]["kernel"])
        return one.apply(params, x, jax.random.key(2), train=True)

    np.testing.assert_array_equal(silent(x), x)
