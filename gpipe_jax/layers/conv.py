"""Convolutions whose gradients are fast on every platform, also inside scan and switch.

XLA:CPU rewrites a convolution's gradients to its fast path only in the entry computation of a
program; inside the pipeline's scan they would run tens of times slower. So on CPU the gradients are
written as convolutions that need no rewriting; elsewhere they are XLA's own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

AXES = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution of x [B, H, W, C] with kernel [h, w, C, F], padding "SAME"."""
    return _plain(x, kernel, stride)


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=AXES)


def _conv2d_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple:
    return _plain(x, kernel, stride), (x, kernel)


def _conv2d_backward(stride: int, saved: tuple, dy: jax.Array) -> tuple:
    def plain(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple:
        return jax.vjp(functools.partial(_plain, stride=stride), x, kernel)[1](dy)

    canonical = functools.partial(_canonical_gradients, stride)
    platforms: dict = {"cpu": canonical, "default": plain}
    return lax.platform_dependent(*saved, dy, **platforms)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _canonical_gradients(
    stride: int, x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients as two forward convolutions in the layout that XLA:CPU computes fast."""
    sizes = list(zip(x.shape[1:3], kernel.shape[:2], dy.shape[1:3], strict=True))
    low = [max((o - 1) * stride + k - n, 0) // 2 for n, k, o in sizes]  # of "SAME" padding
    spread = [(o - 1) * stride + 1 for _, _, o in sizes]  # dy with stride - 1 zeros between
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    pad_x = [(k - 1 - p, n - s + p) for (n, k, _), p, s in zip(sizes, low, spread, strict=True)]
    dx = lax.conv_general_dilated(
        dy, flipped, (1, 1), pad_x, lhs_dilation=(stride,) * 2, dimension_numbers=AXES
    )
    pad_w = [(p, s + k - 1 - n - p) for (n, k, _), p, s in zip(sizes, low, spread, strict=True)]
    dw = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pad_w,
        rhs_dilation=(stride,) * 2, dimension_numbers=AXES,
    )  # fmt: skip
    return dx, dw.transpose(1, 2, 0, 3)


class Conv(nnx.Module):
    """A square convolution without bias, padding "SAME"; x [B, H, W, C] -> [B, H', W', F]."""

    def __init__(
        self, in_features: int, out_features: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        he = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(he(rngs.params(), (size, size, in_features, out_features)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv2d(x, self.kernel[...], self.stride)


def group_norm(features: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm with four groups, or as many as divide the features."""
    return nnx.GroupNorm(features, num_groups=math.gcd(features, 4), rngs=rngs)


class ConvStem(nnx.Module):
    """Images to features: convolution, group norm, relu."""

    def __init__(self, in_features: int, features: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(in_features, features, rngs=rngs)
        self.norm = group_norm(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(x)))


class ResidualBlock(nnx.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); a 1x1 convolution of x where shapes change."""

    def __init__(self, in_features: int, features: int, stride: int = 1, *, rngs: nnx.Rngs) -> None:
        self.norm1 = group_norm(in_features, rngs)
        self.conv1 = Conv(in_features, features, stride=stride, rngs=rngs)
        self.norm2 = group_norm(features, rngs)
        self.conv2 = Conv(features, features, rngs=rngs)
        same = stride == 1 and in_features == features
        self.shortcut = None if same else Conv(in_features, features, 1, stride, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.relu(self.norm1(x)))
        y = self.conv2(jax.nn.relu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ConvHead(nnx.Module):
    """relu, mean over positions, and a linear map to class scores [B, classes]."""

    def __init__(self, in_features: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(in_features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(jax.nn.relu(x).mean((1, 2)))
