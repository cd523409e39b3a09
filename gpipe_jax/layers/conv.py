"""Implement convolutions whose gradients are fast on all platforms, also inside scan and cond.

XLA:CPU rewrites the gradients of a convolution to its fast path only in the entry computation of a
program. Inside the pipeline's scan they would run tens of times slower. So on CPU this module
writes the gradients as convolutions that need no rewriting, and depthwise convolutions as sums of
shifted products (see `windows`). On other platforms all are XLA's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gpipe_jax.layers.windows import Windows, fast_on_cpu, total

AXES = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: jax.Array, kernel: jax.Array, stride: int | tuple[int, int] = 1, padding: str = "SAME"
) -> jax.Array:
    """Convolve x [B, H, W, C] with kernel [h, w, C, F]; padding is "SAME" or "VALID"."""
    h, w = kernel.shape[:2]
    strides = (stride, stride) if isinstance(stride, int) else stride
    windows = Windows((h, w), strides, padding=padding)
    windows.axes(x.shape)  # raises an error if no window fits
    return _conv2d(windows, x, kernel)


def depthwise_conv2d(
    x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1
) -> jax.Array:
    """Convolve each channel of x [B, H, W, C] with its own of the kernels [h, w, C]; "SAME"."""
    h, w, channels = kernel.shape
    if channels != x.shape[3]:
        raise ValueError(
            f"`kernel` is for {channels} channels and `x` has {x.shape[3]}; "
            f"a depthwise convolution needs one kernel for each channel"
        )
    return _depthwise(Windows((h, w), (stride, stride), dilation), x, kernel)


def _plain(windows: Windows, x: jax.Array, kernel: jax.Array) -> jax.Array:
    stride, padding = windows.stride, windows.padding
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=AXES)


def _canonical_gradients(
    windows: Windows, dy: jax.Array, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients as two forward convolutions in the layout that XLA:CPU runs fast."""
    axes, stride = windows.axes(x.shape), windows.stride
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    pads = [axis.transposed_padding for axis in axes]
    dx = lax.conv_general_dilated(
        dy, flipped, (1, 1), pads, lhs_dilation=stride, dimension_numbers=AXES
    )
    dw = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), [axis.padding for axis in axes],
        rhs_dilation=stride, dimension_numbers=AXES,
    )  # fmt: skip
    return dx, dw.transpose(1, 2, 0, 3)


def _plain_depthwise(windows: Windows, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel[:, :, None], windows.stride, windows.padding,
        rhs_dilation=(windows.dilation,) * 2, dimension_numbers=AXES,
        feature_group_count=x.shape[3],
    )  # fmt: skip


def _shifted_products(windows: Windows, x: jax.Array, kernel: jax.Array) -> jax.Array:
    weights = kernel.reshape(-1, x.shape[3])
    return total(view * weight for view, weight in zip(windows.views(x), weights, strict=True))


def _depthwise_gradients(
    windows: Windows, dy: jax.Array, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weights = kernel.reshape(-1, x.shape[3])
    transposed = windows.transposed_views(dy, x.shape)
    dx = total(view * weight for view, weight in zip(transposed, weights, strict=True))
    padded = windows.pad(x)

    # The loop reuses one buffer. Unrolled, each position fills its own, which takes longer.
    def weight_gradient(position: jax.Array) -> jax.Array:
        view = windows.at(padded, *position)
        return (view * dy).sum((0, 1, 2))

    dw = lax.map(weight_gradient, jnp.array(list(np.ndindex(windows.size))))
    return dx, dw.reshape(kernel.shape)


_conv2d = fast_on_cpu(_plain, _canonical_gradients)
_depthwise = fast_on_cpu(_plain_depthwise, _depthwise_gradients, _shifted_products)


class Conv(nnx.Module):
    """Convolve x [B, H, W, C] -> [B, H', W', F]: a square kernel, no bias, padding "SAME"."""

    def __init__(
        self, in_features: int, out_features: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        he = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(he(rngs.params(), (size, size, in_features, out_features)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        dtype = jnp.promote_types(x.dtype, kernel.dtype)  # both differ under `jax_enable_x64`
        return conv2d(x.astype(dtype), kernel.astype(dtype), self.stride)
