"""Define the windows of convolutions and pooling, and forms of them that are fast on CPU.

Along one axis of length 6, windows of 3 positions, dilation 1, stride 2, padding "SAME"; low = 0:

    image      0  1  2  3  4  5  .       . is padding
    window 0  [0  1  2]                  reach 3: elements from a window's first to its last
    window 1        [0  1  2]
    window 2              [0  1  2]      span 5: elements from the first start to the last start
    view 1        1     3     5          position 1 of all windows: [B, H', W', C]

`views` are what all windows have at each position. On CPU an operation on windows is a sum or a
maximum over its views: whole shifted images, which compile to vector code.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Axis(NamedTuple):
    """Describe how windows lie along one axis of an image; all numbers are elements."""

    length: int  # of the image
    reach: int  # of one window
    low: int  # padding before the image
    span: int  # from the first window's start to the last window's start, both included

    @property
    def padding(self) -> tuple[int, int]:
        """Return the padding (or cropping, if negative) of the image to what the windows cover."""
        return self.low, self.span + self.reach - 1 - self.length - self.low

    @property
    def transposed_padding(self) -> tuple[int, int]:
        """Return the padding of the starts to all starts whose window could cover an element."""
        return self.reach - 1 - self.low, self.length - self.span + self.low


class Windows(NamedTuple):
    """Describe windows of h x w positions `dilation` apart, one every `stride` elements."""

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: int = 1
    padding: str = "SAME"  # or "VALID"

    def axes(self, shape: tuple[int, ...]) -> list[Axis]:
        """Return how the windows lie down and across images of shape [B, H, W, C]."""
        return [self._axis(shape, 0), self._axis(shape, 1)]

    def _axis(self, shape: tuple[int, ...], i: int) -> Axis:
        length, stride, reach = shape[1 + i], self.stride[i], (self.size[i] - 1) * self.dilation + 1
        low, high = lax.padtype_to_pads((length,), (reach,), (stride,), self.padding)[0]
        room = low + length + high - reach  # for the first window to move
        if room < 0 and self.padding == "VALID":
            raise ValueError(
                f"`x` is {shape[1]} x {shape[2]}, but a window reaches over {reach} elements of "
                f'axis {1 + i} and must fit with padding "VALID"; give larger images or use "SAME"'
            )
        return Axis(length, reach, low, max(room // stride * stride + 1, 0))

    def pad(self, x: jax.Array, fill: float = 0.0) -> jax.Array:
        """Pad the images x [B, H, W, C] to what the windows cover."""
        return _pad(x, [(*axis.padding, 0) for axis in self.axes(x.shape)], fill)

    def at(self, padded: jax.Array, i: int | jax.Array, j: int | jax.Array) -> jax.Array:
        """Return what all windows have at their position (i, j): [B, H', W', C]."""
        (h, w), d, (B, H, W, C) = self.size, self.dilation, padded.shape
        lengths = B, H - (h - 1) * d, W - (w - 1) * d, C
        shifted = lax.dynamic_slice(padded, (0, i * d, j * d, 0), lengths)
        return shifted[:, :: self.stride[0], :: self.stride[1]]

    def views(self, x: jax.Array, fill: float = 0.0) -> list[jax.Array]:
        """Return what all windows have at each position, row by row: arrays [B, H', W', C]."""
        padded = self.pad(x, fill)
        return [self.at(padded, i, j) for i, j in np.ndindex(self.size)]

    def transposed_views(self, y: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
        """Return the transpose of `views`, for images of `shape` [B, H, W, C].

        For each position, row by row, it is an array [B, H, W, C]. At each element it has the value
        in y [B, H', W', C] of the one window with the element at this position, or zero.
        """
        axes = zip(self.axes(shape), self.stride, strict=True)
        padded = _pad(y, [(*axis.transposed_padding, s - 1) for axis, s in axes], 0)
        dense = self._replace(stride=(1, 1))
        return [dense.at(padded, i, j) for i, j in np.ndindex(self.size)][::-1]


def _pad(x: jax.Array, pads: list[tuple[int, int, int]], fill: float) -> jax.Array:
    return lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """Add arrays of equal shape in one expression, which XLA compiles to one loop."""
    return functools.reduce(jnp.add, terms)


def on_cpu(form: Callable, default: Callable, windows: Windows, *arrays: jax.Array) -> Any:
    """Return `form(windows, *arrays)` in programs for CPU, else `default(windows, *arrays)`."""
    forms = {
        "cpu": functools.partial(form, windows),
        "default": functools.partial(default, windows),
    }
    return lax.platform_dependent(*arrays, **forms)


def fast_on_cpu(plain: Callable, gradients: Callable, forward: Callable | None = None) -> Callable:
    """Return the operation `plain(windows, *arrays)` with faster forms in programs for CPU.

    Args:
        plain: The operation, as on the other platforms.
        gradients: A function (windows, dy, *arrays) -> one gradient for each array.
        forward: Another form of the operation. Default: `plain`.
    """

    def value(windows: Windows, *arrays: jax.Array) -> jax.Array:
        if forward is None:
            return plain(windows, *arrays)
        return on_cpu(forward, plain, windows, *arrays)

    def plain_gradients(windows: Windows, dy: jax.Array, *arrays: jax.Array) -> tuple:
        return jax.vjp(functools.partial(plain, windows), *arrays)[1](dy)

    operation = jax.custom_vjp(value, nondiff_argnums=(0,))

    def forward_pass(windows: Windows, *arrays: jax.Array) -> tuple:
        return value(windows, *arrays), arrays

    def backward_pass(windows: Windows, arrays: tuple, dy: jax.Array) -> tuple:
        return on_cpu(gradients, plain_gradients, windows, dy, *arrays)

    operation.defvjp(forward_pass, backward_pass)
    return operation
