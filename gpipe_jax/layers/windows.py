"""Define the windows of convolutions and pooling, and forms of them that are fast on CPU."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Axis(NamedTuple):
    """How windows lie along one axis of an image; all in elements."""

    length: int  # of the image
    reach: int  # of one window
    low: int  # padding before the image
    span: int  # from the first window's start to the last one's, both included

    @property
    def padding(self) -> tuple[int, int]:
        """Pads the image, or cuts it, to what the windows see."""
        return self.low, self.span + self.reach - 1 - self.length - self.low

    @property
    def transposed_padding(self) -> tuple[int, int]:
        """Pads the windows, or cuts them, to all starts from which an element could be seen."""
        return self.reach - 1 - self.low, self.length - self.span + self.low


class Windows(NamedTuple):
    """Windows of h x w positions `dilation` apart, one every `stride` elements down and across."""

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: int = 1
    padding: str = "SAME"  # or "VALID"

    def axes(self, shape: tuple[int, ...]) -> list[Axis]:
        """How the windows lie down and across images of shape [B, H, W, C]."""
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
        """The images x [B, H, W, C] with as much around them as the windows see."""
        return _pad(x, [(*axis.padding, 0) for axis in self.axes(x.shape)], fill)

    def at(self, padded: jax.Array, i: int | jax.Array, j: int | jax.Array) -> jax.Array:
        """What every window has at its position (i, j): [B, H', W', C]."""
        (h, w), d, (B, H, W, C) = self.size, self.dilation, padded.shape
        lengths = B, H - (h - 1) * d, W - (w - 1) * d, C
        shifted = lax.dynamic_slice(padded, (0, i * d, j * d, 0), lengths)
        return shifted[:, :: self.stride[0], :: self.stride[1]]

    def views(self, x: jax.Array, fill: float = 0.0) -> list[jax.Array]:
        """What the windows see of x: for each position, row by row, [B, H', W', C]."""
        padded = self.pad(x, fill)
        return [self.at(padded, i, j) for i, j in np.ndindex(self.size)]

    def viewers(self, y: jax.Array, shape: tuple[int, ...]) -> list[jax.Array]:
        """The transpose of `views`: who sees each element of images of shape [B, H, W, C].

        For each position, row by row, [B, H, W, C]: at each element the value in y [B, H', W', C]
        of the one window that has the element at this position, or zero.
        """
        axes = zip(self.axes(shape), self.stride, strict=True)
        padded = _pad(y, [(*axis.transposed_padding, s - 1) for axis, s in axes], 0)
        dense = self._replace(stride=(1, 1))
        return [dense.at(padded, i, j) for i, j in np.ndindex(self.size)][::-1]


def _pad(x: jax.Array, pads: list[tuple[int, int, int]], fill: float) -> jax.Array:
    return lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def total(terms: Iterable[jax.Array]) -> jax.Array:
    """The sum of equal shapes, written out for XLA to make one loop of."""
    return functools.reduce(jnp.add, terms)


def on_cpu(form: Callable, default: Callable, windows: Windows, *arrays: jax.Array) -> Any:
    """`form(windows, *arrays)` in programs for CPU, `default(windows, *arrays)` in others."""
    forms = {
        "cpu": functools.partial(form, windows),
        "default": functools.partial(default, windows),
    }
    return lax.platform_dependent(*arrays, **forms)


def fast_on_cpu(plain: Callable, gradients: Callable, forward: Callable | None = None) -> Callable:
    """An operation `plain(windows, *arrays)` that takes other forms on CPU, and only there.

    `gradients(windows, dy, *arrays)` is a tuple, one gradient for each array. Without `forward`
    the value is computed as elsewhere.
    """

    def value(windows: Windows, *arrays: jax.Array) -> jax.Array:
        if forward is None:
            return plain(windows, *arrays)
        return on_cpu(forward, plain, windows, *arrays)

    def plain_gradients(windows: Windows, dy: jax.Array, *arrays: jax.Array) -> tuple:
        return jax.vjp(functools.partial(plain, windows), *arrays)[1](dy)

    operation = jax.custom_vjp(value, nondiff_argnums=(0,))
    operation.defvjp(
        lambda windows, *arrays: (value(windows, *arrays), arrays),
        lambda windows, arrays, dy: on_cpu(gradients, plain_gradients, windows, dy, *arrays),
    )
    return operation
