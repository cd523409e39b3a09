"""Convolutions against their definition, and their own gradients against JAX's.

The own forms are what runs on CPU, and only there.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gpipe_jax.layers import conv
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.zoo import basic

NUMBERS = ("NHWC", "HWIO", "NHWC")


def definition(
    x: np.ndarray, kernel: np.ndarray, stride: tuple[int, int], dilation: int, padding: str
) -> np.ndarray:
    """Convolution of x [B, H, W, C] with kernel [h, w, C, F], element by element."""
    counts, low = [], []
    for n, k, s in zip(x.shape[1:3], kernel.shape[:2], stride, strict=True):
        reach = (k - 1) * dilation + 1
        counts.append(-(-n // s) if padding == "SAME" else (n - reach) // s + 1)
        low.append(max((counts[-1] - 1) * s + reach - n, 0) // 2 if padding == "SAME" else 0)
    y = np.zeros((x.shape[0], *counts, kernel.shape[3]))
    for i, j, p, q in np.ndindex(*counts, *kernel.shape[:2]):
        a, b = i * stride[0] - low[0] + p * dilation, j * stride[1] - low[1] + q * dilation
        if 0 <= a < x.shape[1] and 0 <= b < x.shape[2]:
            y[:, i, j] += x[:, a, b] @ kernel[p, q]
    return y


def assert_same_value_and_gradients(ours: Callable, plain: Callable, *arrays: np.ndarray) -> Any:
    """Both in float64, with the same random gradient coming in. Returns the value."""

    def both(dy: jax.Array, *arrays: jax.Array) -> list[tuple]:
        pulls = [jax.vjp(f, *arrays) for f in (ours, plain)]
        return [(y, *pull(dy)) for y, pull in pulls]

    dy = np.random.default_rng(1).normal(size=jax.eval_shape(plain, *arrays).shape)
    got, wanted = jax.jit(both)(dy, *arrays)
    for name, a, b in zip(("value", "dx", "dkernel"), got, wanted, strict=False):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)
    return got[0]


# (height, width) of x, of the kernel; stride, padding. Even, odd and unequal sizes, and some
# smaller than the kernel; windows that overlap, touch, and leave gaps.
CASES = [
    ((8, 8), (1, 1), 1, "SAME"),
    ((8, 8), (3, 3), 1, "SAME"),
    ((8, 8), (3, 3), 2, "SAME"),
    ((8, 8), (2, 2), 2, "SAME"),
    ((8, 7), (1, 1), 2, "SAME"),
    ((7, 7), (5, 5), 1, "SAME"),
    ((7, 7), (3, 3), 2, "SAME"),
    ((7, 8), (4, 4), 2, "SAME"),
    ((6, 7), (2, 2), 3, "SAME"),
    ((5, 2), (5, 3), 2, "SAME"),
    ((1, 1), (3, 3), 2, "SAME"),
    ((8, 9), (1, 7), 1, "SAME"),
    ((8, 9), (7, 1), 1, "SAME"),
    ((8, 9), (1, 7), (1, 2), "SAME"),
    ((8, 9), (7, 1), (2, 1), "SAME"),
    ((5, 5), (1, 7), 2, "SAME"),
    ((8, 8), (3, 3), 1, "VALID"),
    ((8, 7), (3, 2), 2, "VALID"),
    ((5, 5), (5, 5), 1, "VALID"),
    ((9, 8), (1, 7), (2, 1), "VALID"),
]


@pytest.mark.parametrize(("size", "window", "stride", "padding"), CASES)
def test_convolution_and_its_gradients(
    size: tuple[int, int], window: tuple[int, int], stride: Any, padding: str
) -> None:
    strides = stride if isinstance(stride, tuple) else (stride, stride)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv.conv2d(x, w, stride, padding)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NUMBERS)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(*window, 3, 4))
        y = assert_same_value_and_gradients(ours, plain, x, w)
    np.testing.assert_allclose(y, definition(x, w, strides, 1, padding), rtol=1e-12, atol=1e-12)


# (height, width) of x, of the kernel; stride, dilation.
DEPTHWISE = [
    ((8, 8), (3, 3), 1, 1),
    ((8, 8), (3, 3), 2, 1),
    ((7, 6), (3, 3), 2, 1),
    ((7, 7), (5, 5), 1, 1),
    ((8, 7), (5, 5), 2, 1),
    ((8, 8), (7, 7), 2, 1),
    ((5, 2), (7, 7), 1, 1),
    ((9, 8), (3, 3), 1, 2),
    ((9, 8), (3, 5), 2, 2),
    ((3, 4), (3, 3), 2, 3),
    ((7, 8), (2, 4), 3, 1),
    ((8, 9), (1, 7), 1, 1),
    ((8, 9), (7, 1), 2, 1),
    ((1, 1), (3, 3), 2, 1),
]


def plain_depthwise(x: jax.Array, w: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, w[:, :, None], (stride,) * 2, "SAME", rhs_dilation=(dilation,) * 2,
        dimension_numbers=NUMBERS, feature_group_count=x.shape[3],
    )  # fmt: skip


@pytest.mark.parametrize(("size", "window", "stride", "dilation"), DEPTHWISE)
def test_depthwise_convolution_and_its_gradients(
    size: tuple[int, int], window: tuple[int, int], stride: int, dilation: int
) -> None:
    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv.depthwise_conv2d(x, w, stride, dilation)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return plain_depthwise(x, w, stride, dilation)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(2, *size, 3)), rng.normal(size=(*window, 3))
        y = assert_same_value_and_gradients(ours, plain, x, w)
    dense = w[..., None] * np.eye(3)  # [h, w, C, C]: a channel is seen by its own kernel only
    wanted = definition(x, dense, (stride, stride), dilation, "SAME")
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)


KERNELS: dict[Callable, tuple[int, ...]] = {
    conv.conv2d: (3, 3, 4, 4),
    conv.depthwise_conv2d: (3, 3, 4),
}
OPERATIONS = pytest.mark.parametrize("operation", KERNELS)


@OPERATIONS
def test_gradients_under_scan_checkpoint_and_vmap(operation: Callable) -> None:
    plain = {conv.conv2d: plain_conv, conv.depthwise_conv2d: plain_depthwise}[operation]

    def losses(function: Callable, xs: jax.Array, ws: jax.Array) -> jax.Array:
        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            step = jax.checkpoint(lambda c, _: (jnp.tanh(function(c, w)), (c**2).sum()))
            return lax.scan(step, x, None, length=3)[1].sum()

        return jax.vmap(loss)(xs, ws)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        xs, ws = rng.normal(size=(2, 2, 5, 6, 4)), rng.normal(size=(2, *KERNELS[operation]))
        assert_same_value_and_gradients(
            lambda *a: losses(operation, *a), lambda *a: losses(plain, *a), xs, ws
        )


def plain_conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS)


@OPERATIONS
def test_values_and_gradients_keep_the_dtype(operation: Callable) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((1, 8, 8, 4), KERNELS[operation])]

    def results(dtype: Any) -> tuple:
        y, pull = jax.vjp(operation, *(jnp.asarray(a, dtype) for a in arrays))
        return y, *pull(jnp.ones_like(y))

    half, wanted = jax.jit(results, static_argnums=0)(jnp.bfloat16), results(jnp.float32)
    for a, b in zip(half, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0, atol=0.01 * np.abs(b).max())


def test_an_error_where_no_window_fits() -> None:
    x, kernel = jnp.ones((1, 4, 9, 2)), jnp.ones((5, 5, 2, 2))
    with pytest.raises(ValueError, match=r"`x` is 4 x 9, but a window reaches over 5 .* use \"SAM"):
        conv.conv2d(x, kernel, padding="VALID")


def test_an_error_for_a_depthwise_kernel_of_other_channels() -> None:
    with pytest.raises(
        ValueError, match=r"`kernel` is for 1 channels and `x` has 3; .* one kernel"
    ):
        conv.depthwise_conv2d(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 1)))


def gradients_in_a_scan(function: Callable) -> Callable:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple:
            y = function(c, w)
            return y, (y**2).sum()

        return lax.scan(body, x, None, length=3)[1].sum()

    return jax.jit(jax.grad(loss, (0, 1)))


def arrays_for(operation: Callable) -> list[jax.Array]:
    return [jnp.ones((2, 8, 8, 4)), jnp.ones(KERNELS[operation])]


def convolution_layouts(function: Callable, arrays: list[jax.Array]) -> list[str]:
    text = gradients_in_a_scan(function).lower(*arrays).compile().as_text()
    return re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)


def test_inside_a_scan_every_convolution_is_in_the_layout_that_cpu_computes_fast() -> None:
    """XLA:CPU calls Eigen for b01f_01io->b01f only, and else runs loops tens of times slower."""
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA:CPU")
    arrays = arrays_for(conv.conv2d)
    layouts = convolution_layouts(conv.conv2d, arrays)
    assert len(layouts) == 3 and set(layouts) == {"b01f_01io->b01f"}
    assert len(set(convolution_layouts(plain_conv, arrays))) == 3  # what is to be avoided


def test_inside_a_scan_a_depthwise_convolution_is_none_on_cpu() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA:CPU")
    arrays = arrays_for(conv.depthwise_conv2d)
    assert convolution_layouts(conv.depthwise_conv2d, arrays) == []
    assert len(convolution_layouts(plain_depthwise, arrays)) == 3


def test_other_platforms_use_their_own_forms() -> None:
    """Compare with the operations and windows of plain JAX; on CPU they are others."""
    x, w = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 2, 4, 4))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, w, (1, 2), "VALID", dimension_numbers=NUMBERS)
        return plain_depthwise(y, w[..., 0], 2, 3)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv.depthwise_conv2d(conv.conv2d(x, w, (1, 2), "VALID"), w[..., 0], 2, 3)

    def convolutions(function: Callable, platform: str) -> list[str]:
        gradients = jax.jit(lambda x, w: jax.vjp(function, x, w)[1](function(x, w)))
        text = gradients.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"stablehlo\.convolution\(.*?\) (.*)", text))

    for platform in ("tpu", "cuda"):
        assert set(convolutions(ours, platform)) == set(convolutions(plain, platform))
    assert len(set(convolutions(plain, "tpu"))) == 6
    assert len(set(convolutions(ours, "cpu")) & set(convolutions(plain, "cpu"))) == 1  # the value


LAYERS: list[tuple[Layer, tuple[int, ...], tuple[int, ...]]] = [
    (layer(conv.Conv, in_features=3, out_features=5), (2, 7, 6, 3), (2, 7, 6, 5)),
    (layer(conv.Conv, in_features=3, out_features=5, stride=2), (2, 7, 6, 3), (2, 4, 3, 5)),
    (layer(basic.ConvStem, in_features=1, features=16), (2, 6, 6, 1), (2, 6, 6, 16)),
    (layer(basic.ResidualBlock, in_features=4, features=4), (2, 6, 6, 4), (2, 6, 6, 4)),
    (layer(basic.ResidualBlock, in_features=4, features=8, stride=2), (2, 7, 6, 4), (2, 4, 3, 8)),
    (layer(basic.ConvHead, in_features=4, classes=10), (2, 6, 6, 4), (2, 10)),
]


@pytest.mark.parametrize(("one", "shape", "wanted"), LAYERS, ids=[str(case[0]) for case in LAYERS])
def test_shapes_of_the_convolution_layers(
    one: Layer, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    context = Context(jax.random.key(0), train=True)
    params = jax.eval_shape(one.init, context.key, x)
    y, _ = jax.eval_shape(lambda p, x: one.apply(p, {}, x, context), params, x)
    assert y.shape == wanted


def test_a_residual_block_of_equal_shapes_has_no_shortcut_weights() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
    same = layer(basic.ResidualBlock, in_features=4, features=4)
    wider = layer(basic.ResidualBlock, in_features=4, features=8)
    key = jax.random.key(0)
    assert "shortcut" not in jax.eval_shape(same.init, key, x)
    assert "shortcut" in jax.eval_shape(wider.init, key, x)


def test_a_residual_block_adds_its_input() -> None:
    one, x = LAYERS[3][0], jax.random.normal(jax.random.key(0), (1, 4, 4, 4))

    @jax.jit
    def silent(x: jax.Array) -> jax.Array:
        params = one.init(jax.random.key(1), x)
        params["conv2"]["kernel"] = jnp.zeros_like(params["conv2"]["kernel"])
        return one.apply(params, {}, x, Context(jax.random.key(2), train=True))[0]

    np.testing.assert_array_equal(silent(x), x)
