"""Define every operation of a cell in NumPy, and run modules to compare with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpipe_jax.zoo.amoebanet.conv_norm import (
    Normalization,
)

NORM = Normalization()
FEATURES = 8


def windows(
    x: np.ndarray, size: tuple, stride: tuple, dilation: int = 1, fill: float = 0.0
) -> np.ndarray:
    """Return what windows of padding "SAME" see: [B, H', W', h, w, C]."""
    places = []
    for n, k, s in zip(x.shape[1:3], size, stride, strict=True):
        out = -(-n // s)
        total = max((out - 1) * s + (k - 1) * dilation + 1 - n, 0)
        first = np.arange(out) * s - total // 2
        places.append(first[:, None] + np.arange(k) * dilation)
    room = 2 * max(size) * dilation
    padded = np.pad(x, ((0, 0), (room, room), (room, room), (0, 0)), constant_values=fill)
    rows, columns = (a + room for a in places)
    return padded[:, rows[:, None, :, None], columns[None, :, None, :]]


def conv(x: np.ndarray, kernel: np.ndarray, stride: tuple = (1, 1)) -> np.ndarray:
    return np.einsum("bijhwc,hwcf->bijf", windows(x, kernel.shape[:2], stride), kernel)


def depthwise(x: np.ndarray, kernel: np.ndarray, stride: tuple, dilation: int) -> np.ndarray:
    return np.einsum("bijhwc,hwc->bijc", windows(x, kernel.shape[:2], stride, dilation), kernel)


def batch_norm(x: np.ndarray, params: dict) -> np.ndarray:
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]


def conv_norm_of(
    x: np.ndarray, params: dict, stride: tuple = (1, 1), relu: bool = True
) -> np.ndarray:
    x = np.maximum(x, 0) if relu else x
    return batch_norm(conv(x, params["kernel"], stride), params["norm"])


def match_of(x: np.ndarray, params: dict, relu: bool) -> np.ndarray:
    """x, a 1x1 convolution of it, or a factorized reduction, as the parameters tell."""
    if not params:
        return x
    if "kernel" in params:
        return conv_norm_of(x, params, relu=relu)
    x = np.maximum(x, 0) if relu else x
    rows, columns = x.shape[1:3]
    odd = np.zeros_like(x[:, ::2, ::2])
    seen = x[:, 1:rows:2, 1:columns:2]
    odd[:, : seen.shape[1], : seen.shape[2]] = seen
    parts = [x[:, ::2, ::2] @ params["even"][0, 0], odd @ params["odd"][0, 0]]
    return batch_norm(np.concatenate(parts, -1), params["norm"])


def separable(x: np.ndarray, params: dict, stride: int, *, size: int, dilation: int = 1) -> Any:
    for i, s in enumerate((stride, 1)):
        part = params["layers"][i]
        assert part["depthwise"].shape[:2] == (size, size)
        y = depthwise(np.maximum(x, 0), part["depthwise"], (s, s), dilation)
        x = batch_norm(conv(y, part["pointwise"]), part["norm"])
    return x


def pool(x: np.ndarray, params: dict, stride: int, *, size: int, kind: str) -> np.ndarray:
    strides = (stride, stride)
    if kind == "max":
        y = windows(x, (size, size), strides, fill=-np.inf).max((3, 4))
    else:
        y = np.nanmean(windows(x, (size, size), strides, fill=np.nan), (3, 4))
    return match_of(y, params.get("match", {}), relu=False)


def bottleneck(x: np.ndarray, params: dict, stride: int, *, sizes: list[tuple]) -> np.ndarray:
    steps = [((1, 1), (1, 1)), *sizes, ((1, 1), (1, 1))]
    for i, (size, along) in enumerate(steps):
        part = params["layers"][i]
        assert part["kernel"].shape[:2] == size
        x = conv_norm_of(x, part, tuple(stride if a > 1 else 1 for a in along))
        wanted = FEATURES if i == len(steps) - 1 else FEATURES // 4
        assert x.shape[-1] == wanted
    return x


def conv_1x1(x: np.ndarray, params: dict, stride: int) -> np.ndarray:
    return conv_norm_of(x, params, (stride, stride)) if params else x


DEFINITIONS = {
    "identity": conv_1x1,
    "sep_3x3": functools.partial(separable, size=3),
    "sep_5x5": functools.partial(separable, size=5),
    "sep_7x7": functools.partial(separable, size=7),
    "avg_pool_3x3": functools.partial(pool, size=3, kind="avg"),
    "max_pool_3x3": functools.partial(pool, size=3, kind="max"),
    "dil_sep_3x3": functools.partial(separable, size=3, dilation=2),
    "conv_1x7_7x1": functools.partial(bottleneck, sizes=[((1, 7), (1, 2)), ((7, 1), (2, 1))]),
    "conv_1x1": conv_1x1,
    "conv_3x3": functools.partial(bottleneck, sizes=[((3, 3), (2, 2))]),
    "max_pool_2x2": functools.partial(pool, size=2, kind="max"),
    "dil_2_sep_5x5": functools.partial(separable, size=5),
}


def randomized(module: nnx.Module, seed: int = 0) -> dict:
    """Puts float64 values into all parameters, also scales and biases; returns them."""
    rng = np.random.default_rng(seed)
    params, stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    values = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
    nnx.update(module, values, jax.tree.map(lambda a: a.astype("float64"), stats))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(values))


def apply(module: nnx.Module, x: Any, seed: int | None = None, **kwargs: Any) -> Any:
    """Return the module's output, compiled; batch norms use the batch. A seed makes `rngs`."""
    graph, state = nnx.split(module)

    def call(state: Any, x: Any) -> Any:
        rngs = {} if seed is None else {"rngs": nnx.Rngs(seed)}
        return nnx.merge(graph, state)(x, **rngs, **kwargs)

    return jax.jit(call)(state, x)
