"""Pooling against its definition, and its own gradients against JAX's.

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

from gpipe_jax.layers import pooling


def inside(length: int, size: int, stride: int, padding: str) -> list[range]:
    """For each window along an axis, the elements of the image in it."""
    same = padding == "SAME"
    count = -(-length // stride) if same else (length - size) // stride + 1
    low = max((count - 1) * stride + size - length, 0) // 2 if same else 0
    starts = [i * stride - low for i in range(count)]
    return [range(max(start, 0), min(start + size, length)) for start in starts]


def by_definition(
    function: Callable, x: np.ndarray, size: int, stride: int, padding: str = "SAME"
) -> np.ndarray:
    """`function` of what is in each window, [B, rows, columns, C], to [B, C]."""
    down, across = (inside(n, size, stride, padding) for n in x.shape[1:3])
    parts = [[function(x[:, rows][:, :, columns]) for columns in across] for rows in down]
    return np.moveaxis(np.array(parts), 2, 0)


def plain_max(x: jax.Array, size: int, stride: int) -> jax.Array:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME")


def plain_mean(x: jax.Array, size: int, stride: int, padding: str = "SAME") -> jax.Array:
    def window_sum(x: jax.Array) -> jax.Array:
        window, strides = (1, size, size, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, 0.0, lax.add, window, strides, padding)

    return window_sum(x) / window_sum(jnp.ones_like(x))


def assert_same_value_and_gradient(ours: Callable, plain: Callable, x: np.ndarray) -> Any:
    """Both in float64, with the same random gradient coming in. Returns the value."""

    def both(x: jax.Array, dy: jax.Array) -> list[tuple]:
        pulls = [jax.vjp(f, x) for f in (ours, plain)]
        return [(y, *pull(dy)) for y, pull in pulls]

    dy = np.random.default_rng(1).normal(size=jax.eval_shape(plain, x).shape)
    got, wanted = jax.jit(both)(x, dy)
    for name, a, b in zip(("value", "dx"), got, wanted, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)
    return got[0]


# (height, width) of x; size and stride of the window. Even, odd and unequal sizes, and some smaller
# than the window; windows that overlap, touch, and leave gaps.
CASES = [
    ((8, 8), 3, 1),
    ((8, 7), 3, 2),
    ((8, 7), 2, 2),
    ((7, 5), 2, 1),
    ((6, 7), 5, 3),
    ((7, 8), 2, 3),
    ((4, 2), 5, 1),
    ((1, 3), 3, 2),
]


@pytest.mark.parametrize(("shape", "size", "stride"), CASES)
def test_max_pool_and_its_gradient(shape: tuple[int, int], size: int, stride: int) -> None:
    with jax.enable_x64(True):
        # Below zero everywhere, so that padding with zeros would be seen.
        x = -np.random.default_rng(0).uniform(1, 2, (2, *shape, 3))
        y = assert_same_value_and_gradient(
            lambda x: pooling.max_pool(x, size, stride), lambda x: plain_max(x, size, stride), x
        )
    np.testing.assert_array_equal(y, by_definition(lambda a: a.max((1, 2)), x, size, stride))


@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding"),
    [*((*case, "SAME") for case in CASES), ((8, 8), 5, 3, "VALID"), ((5, 9), 5, 3, "VALID")],
)
def test_average_pool_and_its_gradient(
    shape: tuple[int, int], size: int, stride: int, padding: str
) -> None:
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(2, *shape, 3))
        y = assert_same_value_and_gradient(
            lambda x: pooling.avg_pool(x, size, stride, padding),
            lambda x: plain_mean(x, size, stride, padding),
            x,
        )
    wanted = by_definition(lambda a: a.mean((1, 2)), x, size, stride, padding)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "size", "stride"), CASES)
def test_the_gradient_of_equal_maxima_goes_to_the_first(
    shape: tuple[int, int], size: int, stride: int
) -> None:
    """Images of few values, so that most windows have their maximum several times."""
    x = np.random.default_rng(0).integers(0, 2, (4, *shape, 2)).astype(np.float64)
    dx = np.zeros_like(x)
    down, across = (inside(n, size, stride, "SAME") for n in shape)
    for b, i, j, c in np.ndindex(4, len(down), len(across), 2):
        places = [(row, column) for row in down[i] for column in across[j]]
        row, column = max(places, key=lambda place: x[b, *place, c])  # the first of equals
        dx[b, row, column, c] += 1 + i + 10 * j
    dy = np.broadcast_to(
        1 + np.arange(len(down))[:, None, None] + 10 * np.arange(len(across))[:, None],
        (4, len(down), len(across), 2),
    )
    for function in (pooling.max_pool, plain_max):
        pull = jax.jit(lambda x, dy, f=function: jax.vjp(lambda x: f(x, size, stride), x)[1](dy))
        np.testing.assert_array_equal(pull(jnp.float32(x), jnp.float32(dy))[0], dx)


def check_maxima_of_maxima(dtype: str) -> None:
    """Compare gradients of a maximum of maxima, which are equal where they see the same."""

    def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
        x = x - x.mean((0, 1, 2))
        return x * (jax.lax.rsqrt((x**2).mean((0, 1, 2)) + 1e-3) * by[0]) + by[1]

    def loss(arrays: tuple, maximum: Callable) -> jax.Array:
        x, y, wide, by = arrays
        z = scaled(x, by[:2]) + scaled(y, by[2:4])
        both = maximum(z, 3, 1) + maximum(scaled(wide, by[4:]), 3, 2)
        return (jnp.sin(maximum(both, 3, 1)) * jnp.arange(16)).sum()

    rng = np.random.default_rng(0)
    shapes = (32, 2, 2, 16), (32, 2, 2, 16), (32, 4, 4, 16), (6, 16)
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(0.5 + rng.normal(size=shape), dtype) for shape in shapes)
        ours, plain = (
            jax.jit(jax.grad(lambda a, f=f: loss(a, f)))(arrays)
            for f in (pooling.max_pool, plain_max)
        )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_window_has_one_maximum_also_if_its_input_is_computed_twice(dtype: str) -> None:
    check_maxima_of_maxima(dtype)


@pytest.mark.xfail(
    reason="XLA:CPU of jaxlib 0.10.2 computes it again for each reader", strict=False
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_computed_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this passes on all supported versions, `computed_once` can go."""
    monkeypatch.setattr(pooling, "computed_once", lambda a: a)
    check_maxima_of_maxima(dtype)


POOLS = pytest.mark.parametrize(
    ("ours", "plain"), [(pooling.max_pool, plain_max), (pooling.avg_pool, plain_mean)]
)


@POOLS
def test_gradients_under_scan_checkpoint_and_vmap(ours: Callable, plain: Callable) -> None:
    def losses(function: Callable, xs: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            step = jax.checkpoint(lambda c, _: (jnp.sin(3 * function(c, 3, 1)), (c**2).sum()))
            return lax.scan(step, x, None, length=3)[1].sum()

        return jax.vmap(loss)(xs)

    with jax.enable_x64(True):
        xs = np.random.default_rng(0).normal(size=(2, 2, 5, 6, 3))
        assert_same_value_and_gradient(lambda x: losses(ours, x), lambda x: losses(plain, x), xs)


@POOLS
def test_values_and_gradients_keep_the_dtype(ours: Callable, plain: Callable) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 8, 4)), jnp.bfloat16)

    def results(function: Callable, x: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda x: function(x, 3, 2), x)
        return y, *pull(jnp.ones_like(y))

    half = jax.jit(lambda x: results(ours, x))(x)
    for a, b in zip(half, results(plain, x.astype(jnp.float32)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0, atol=0.01 * np.abs(b).max())


def test_pools_of_no_images_are_empty() -> None:
    x = jnp.zeros((0, 5, 5, 2))
    for function in (pooling.max_pool, pooling.avg_pool):
        y, pull = jax.vjp(lambda x, f=function: f(x, 3, 2), x)
        assert y.shape == (0, 3, 3, 2) and pull(y)[0].shape == x.shape


def test_an_average_keeps_nothing_for_its_gradient_and_a_maximum_its_input() -> None:
    """Count what is kept: it takes memory for every layer between forward and backward."""
    kept = {
        function: sum(
            a.size for a in jax.tree.leaves(jax.vjp(lambda x, f=function: f(x, 3, 1), X)[1])
        )
        for function in (pooling.avg_pool, pooling.max_pool)
    }
    assert kept[pooling.avg_pool] < X.size <= kept[pooling.max_pool] < 2 * X.size


def test_an_error_where_no_window_fits() -> None:
    with pytest.raises(
        ValueError, match=r"`x` is 6 x 4, but a window reaches over 5 .* axis 2 and"
    ):
        pooling.avg_pool(jnp.ones((1, 6, 4, 2)), 5, 3, "VALID")


X = jnp.ones((2, 9, 8, 4))


def gradient_in_a_scan(function: Callable) -> Callable:
    def loss(x: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple:
            y = function(c, 3, 1)
            return y, (y**2).sum()

        return lax.scan(body, x, None, length=3)[1].sum()

    return jax.jit(jax.grad(loss))


@POOLS
def test_on_cpu_there_is_no_window_reduction(ours: Callable, plain: Callable) -> None:
    """XLA:CPU runs those, and above all select-and-scatter, as scalar loops."""
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA:CPU")
    slow = re.compile(r" (?:reduce-window|select-and-scatter)\(")
    text = {f: gradient_in_a_scan(f).lower(X).compile().as_text() for f in (ours, plain)}
    assert slow.search(text[plain])
    assert not slow.search(text[ours])


def test_other_platforms_use_their_own_forms() -> None:
    """Compare with the operations and windows of plain JAX; CPU uses none of them."""

    def ours(x: jax.Array) -> jax.Array:
        return pooling.avg_pool(pooling.max_pool(x, 3, 2), 3, 2, "VALID")

    def plain(x: jax.Array) -> jax.Array:
        return plain_mean(plain_max(x, 3, 2), 3, 2, "VALID")

    def operations(function: Callable, platform: str) -> set[tuple]:
        gradient = jax.jit(lambda x: jax.vjp(function, x)[1](function(x)))
        text = gradient.trace(X).lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"stablehlo\.(reduce_window|select_and_scatter).*?<\{(.*?)\}>", text))

    for platform in ("tpu", "cuda"):
        assert operations(ours, platform) == operations(plain, platform)
    assert len(operations(plain, "tpu")) == 4  # two values and two gradients
    assert operations(ours, "cpu") == set()
