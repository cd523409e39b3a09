"""relu, a convolution without bias, batch norm: what the cells of an AmoebaNet are made of.

Letters: B images, H and W height and width, C and F features before and after, h and w positions
in a kernel.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.layers.conv import conv2d, depthwise_conv2d

INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
"""How all kernels start."""

EPSILON = 1e-3
"""Added to the variance in batch norm."""


@dataclass(frozen=True)
class Normalization:
    """How the batch norms of a network work; each has a scale and a bias."""

    momentum: float = 0.9997  # decay of the running statistics, once a step
    axis_name: str | None = None  # of the replicas to normalise over, if over more than one

    def make(self, features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
        """A batch norm over all but the last axis."""
        return nnx.BatchNorm(
            features,
            momentum=self.momentum,
            epsilon=EPSILON,
            axis_name=self.axis_name,
            rngs=rngs,
        )


def kernel(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A convolution kernel [h, w, C, F]."""
    return nnx.Param(INIT(rngs.params(), shape))


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """The convolution of x with a kernel [h, w, C, F], in the type of x.

    A kernel of one row or column has its stride along that only. Most kernels of a cell are 1x1;
    as a matrix product that is fast everywhere, and quick to trace and compile.
    """
    h, w = kernel.shape[:2]
    kernel = kernel.astype(x.dtype)
    if h == w == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    strides = (stride if h > 1 else 1, stride if w > 1 else 1)
    return conv2d(x, kernel, strides, padding)


def halve(x: jax.Array, even: jax.Array, odd: jax.Array) -> jax.Array:
    """Half the resolution: two 1x1 convolutions side by side, of the even and of the odd pixels."""
    shifted = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]  # for odd sizes
    return jnp.concatenate([convolve(x, even, 2), convolve(shifted, odd, 2)], -1)


class Identity(nnx.Module):
    """x itself."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class ConvNorm(nnx.Module):
    """relu (if wanted), a convolution without bias, batch norm; `size` is of the kernel, [h, w].

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
    """relu, a depthwise and then a 1x1 convolution without bias, batch norm."""

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
        # Of one filter for each channel, so its fan out is that of one output channel.
        self.depthwise = nnx.Param(INIT(rngs.params(), (size, size, in_features, 1))[..., 0])
        self.pointwise = kernel(rngs, 1, 1, in_features, features)
        self.norm = norm.make(features, rngs)
        self.stride, self.dilation = stride, dilation

    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = self.depthwise[...].astype(x.dtype)
        y = depthwise_conv2d(jax.nn.relu(x), depthwise, self.stride, self.dilation)
        return self.norm(convolve(y, self.pointwise[...])).astype(x.dtype)


class FactorizedReduction(nnx.Module):
    """relu (if wanted), half the resolution by `halve`, batch norm.

    As it reads the odd pixels too, the stride loses fewer of them.
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
    """x in the width and resolution of another tensor: a convolution of it where they differ."""
    if stride > 1:
        return FactorizedReduction(in_features, features, relu=relu, norm=norm, rngs=rngs)
    if in_features != features:
        return ConvNorm(in_features, features, relu=relu, norm=norm, rngs=rngs)
    return Identity()
