"""Implement pooling that is fast on all platforms.

XLA:CPU runs pooling about ten times slower than necessary, and depthwise convolutions inside a loop
a hundred times. So on CPU these operations work on whole shifted images, one for each position in a
window (see `windows`). On other platforms they are XLA's own.

Letters: B images, H and W height and width, C channels, H' and W' windows down and across, h and w
positions in a window.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.layers.windows import Axis, Windows, fast_on_cpu, on_cpu, total
from gpipe_jax.utils.xla_workarounds import computed_once


def _reduce(windows: Windows, x: jax.Array, start: float, operator: Callable) -> jax.Array:
    size, strides = (1, *windows.size, 1), (1, *windows.stride, 1)
    return lax.reduce_window(x, start, operator, size, strides, windows.padding)


def _max(windows: Windows, x: jax.Array) -> jax.Array:
    return _reduce(windows, x, -jnp.inf, lax.max)


def _max_on_cpu(windows: Windows, x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, windows.views(x, -jnp.inf))


def _max_gradients(windows: Windows, dy: jax.Array, x: jax.Array) -> tuple[jax.Array]:
    chosen = windows.transposed_views(computed_once(_first_maximum(windows, x)), x.shape)
    pairs = enumerate(zip(chosen, windows.transposed_views(dy, x.shape), strict=True))
    return (total(jnp.where(position == t, d, 0) for t, (position, d) in pairs),)


def _first_maximum(windows: Windows, x: jax.Array) -> jax.Array:
    """Return the position, counted row by row, of the first maximum of each window."""
    best, *others = windows.views(x, -jnp.inf)
    position = jnp.zeros(best.shape, jnp.int32)
    for t, view in enumerate(others, 1):
        better = view > best
        best, position = jnp.where(better, view, best), jnp.where(better, t, position)
    return position


_window_max = fast_on_cpu(_max, _max_gradients, _max_on_cpu)


def _sum(windows: Windows, x: jax.Array) -> jax.Array:
    return _reduce(windows, x, 0.0, lax.add)


def _sum_on_cpu(windows: Windows, x: jax.Array) -> jax.Array:
    return total(windows.views(x))


# This is not `fast_on_cpu`, which would store x for a gradient that needs only its shape.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _window_sum(windows: Windows, shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    return on_cpu(_sum_on_cpu, _sum, windows, x)


def _window_sum_forward(windows: Windows, shape: tuple[int, ...], x: jax.Array) -> tuple:
    return _window_sum(windows, shape, x), None


def _window_sum_backward(
    windows: Windows, shape: tuple[int, ...], _: None, dy: jax.Array
) -> tuple[jax.Array]:
    def cpu(windows: Windows, dy: jax.Array) -> tuple[jax.Array]:
        return (total(windows.transposed_views(dy, shape)),)

    def plain(windows: Windows, dy: jax.Array) -> tuple[jax.Array]:
        x = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(functools.partial(_sum, windows), x)(dy)

    return on_cpu(cpu, plain, windows, dy)


_window_sum.defvjp(_window_sum_forward, _window_sum_backward)


def max_pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Return the maximum in each window of x [B, H, W, C], padding "SAME".

    The gradient goes to one element of a window, its first maximum row by row.
    """
    return _window_max(Windows((size, size), (stride, stride)), x)


def avg_pool(x: jax.Array, size: int, stride: int, padding: str = "SAME") -> jax.Array:
    """Return the mean of each window of x [B, H, W, C] over its elements inside the image."""
    windows = Windows((size, size), (stride, stride), padding=padding)
    down, across = (_elements_seen(axis, stride) for axis in windows.axes(x.shape))
    counts = down[:, None, None] * across[:, None]
    return _window_sum(windows, x.shape, x) / counts.astype(x.dtype)


def _elements_seen(axis: Axis, stride: int) -> np.ndarray:
    """Count the elements of the image in each window along an axis: int [H'] or [W']."""
    starts = np.arange(0, axis.span, stride) - axis.low
    return np.minimum(starts + axis.reach, axis.length) - np.maximum(starts, 0)
