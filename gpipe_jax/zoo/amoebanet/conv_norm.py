"""Implement relu, convolution without bias and batch norm, the units of an AmoebaNet's cells.

Letters: B images, H and W height and width, C and F features before and after, h and w positions
in a kernel.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.layers.conv import conv2d, depthwise_conv2d

INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
"""Initializer of all kernels."""

EPSILON = 1e-3
"""Number that batch norm adds to the variance."""


@dataclass(frozen=True)
class Normalization:
    """Configure the batch norms of a network; each has a scale and a bias."""

    momentum: float = 0.9997  # decay of the running statistics, once a step
    axis_name: str | None = None  # axis of the replicas to normalise over; None: over one

    def make(self, features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
        """Return a batch norm over all axes but the last."""
        return nnx.BatchNorm(
            features,
            momentum=self.momentum,
            epsilon=EPSILON,
            axis_name=self.axis_name,
            rngs=rngs,
        )


def kernel(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Return a convolution kernel [h, w, C, F]."""
    return nnx.Param(INIT(rngs.params(), shape))


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """Convolve x with a kernel [h, w, C, F], in the type of x.

    A kernel of one row or column has its stride along that only. Most kernels of a cell are 1x1. A
    matrix product is fast on all platforms for these, and quick to trace and compile.
    """
    h, w = kernel.shape[:2]
    kernel = kernel.astype(x.dtype)
    if h == w == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    strides = (stride if h > 1 else 1, stride if w > 1 else 1)
    return conv2d(x, kernel, strides, padding)


def halve(x: jax.Array, even: jax.Array, odd: jax.Array) -> jax.Array:
    """Halve the resolution by two 1x1 convolutions side by side, of even and of odd pixels."""
    shifted = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]  # for odd sizes
    return jnp.concatenate([convolve(x, even, 2), convolve(shifted, odd, 2)], -1)


class Identity(nnx.Module):
    """Return x."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class ConvNorm(nnx.Module):
    """Apply relu (if `relu`), a convolution of kernel `size` [h, w] without bias, batch norm.

    A kernel of one row or column has its stride along that only. Batch norm is in float32 at least.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int = 1,
        *,
        size: tuple[int, int] = (1, 1),
        padding: str = "SAME",
        relu: bool = True,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = kernel(rngs, *size, in_features, features)
        self.norm = norm.make(features, rngs)
        self.stride, self.padding, self.relu = stride, padding, relu

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x) if self.relu else x
        y = convolve(x, self.kernel[...], self.stride, self.padding)
        return self.norm(y).astype(x.dtype)


class SeparableNorm(nnx.Module):
    """Apply relu, a depthwise and then a 1x1 convolution without bias, batch norm."""

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int = 1,
        *,
        size: int,
        dilation: int = 1,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        # There is one filter for each channel, so the fan-out is that of one output channel.
        self.depthwise = nnx.Param(INIT(rngs.params(), (size, size, in_features, 1))[..., 0])
        self.pointwise = kernel(rngs, 1, 1, in_features, features)
        self.norm = norm.make(features, rngs)
        self.stride, self.dilation = stride, dilation

    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = self.depthwise[...].astype(x.dtype)
        y = depthwise_conv2d(jax.nn.relu(x), depthwise, self.stride, self.dilation)
        return self.norm(convolve(y, self.pointwise[...])).astype(x.dtype)


class FactorizedReduction(nnx.Module):
    """Apply relu (if `relu`), halve the resolution by `halve`, apply batch norm.

    It reads even and odd pixels, so the stride drops fewer of them.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        relu: bool = True,
        norm: Normalization,
        rngs: nnx.Rngs,
    ) -> None:
        self.even = kernel(rngs, 1, 1, in_features, features // 2)
        self.odd = kernel(rngs, 1, 1, in_features, features - features // 2)
        self.norm = norm.make(features, rngs)
        self.relu = relu

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x) if self.relu else x
        return self.norm(halve(x, self.even[...], self.odd[...])).astype(x.dtype)


def match(
    in_features: int,
    features: int,
    stride: int,
    *,
    relu: bool,
    norm: Normalization,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return a module that brings x to a width and resolution: a convolution if they differ."""
    if stride > 1:
        return FactorizedReduction(in_features, features, relu=relu, norm=norm, rngs=rngs)
    if in_features != features:
        return ConvNorm(in_features, features, relu=relu, norm=norm, rngs=rngs)
    return Identity()
