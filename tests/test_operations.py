"""What every operation computes, against its definition in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax import genotype
from gpipe_jax.layers import conv_norm
from gpipe_jax.layers.conv_norm import ConvNorm, FactorizedReduction, Normalization, SeparableNorm
from gpipe_jax.layers.operations import OPERATIONS

NORM = Normalization()
FEATURES = 8

# --- definitions ----------------------------------------------------------------------------------


def windows(
    x: np.ndarray, size: tuple, stride: tuple, dilation: int = 1, fill: float = 0.0
) -> np.ndarray:
    """What windows of padding "SAME" see: [B, H', W', h, w, C]."""
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

# --- tests ----------------------------------------------------------------------------------------


def randomized(module: nnx.Module, seed: int = 0) -> dict:
    """Puts float64 values into all parameters, also scales and biases; returns them."""
    rng = np.random.default_rng(seed)
    params, stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    values = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
    nnx.update(module, values, jax.tree.map(lambda a: a.astype("float64"), stats))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(values))


def apply(module: nnx.Module, x: Any, seed: int | None = None, **kwargs: Any) -> Any:
    """The module's output, compiled; batch norms use the batch. With a seed it is given `rngs`."""
    graph, state = nnx.split(module)

    def call(state: Any, x: Any) -> Any:
        rngs = {} if seed is None else {"rngs": nnx.Rngs(seed)}
        return nnx.merge(graph, state)(x, **rngs, **kwargs)

    return jax.jit(call)(state, x)


def test_there_is_every_operation_of_a_genotype() -> None:
    assert tuple(OPERATIONS) == genotype.OPERATIONS == tuple(DEFINITIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("stride", "in_features"), [(1, FEATURES), (2, FEATURES), (1, 3)])
def test_an_operation_computes_its_definition(name: str, stride: int, in_features: int) -> None:
    with jax.enable_x64(True):
        op = OPERATIONS[name](in_features, FEATURES, stride, norm=NORM, rngs=nnx.Rngs(0))
        params = randomized(op)
        x = np.random.default_rng(1).normal(size=(2, 7, 6, in_features))
        y = apply(op, x)
    wanted = DEFINITIONS[name](x, params, stride)
    assert y.dtype == np.float64 and y.shape == (2, -(-7 // stride), 6 // stride, FEATURES)
    np.testing.assert_allclose(y, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [(7, 6), (4, 5)])
def test_a_factorized_reduction_reads_even_and_odd_pixels(size: tuple, relu: bool) -> None:
    with jax.enable_x64(True):
        reduction = FactorizedReduction(3, 5, relu=relu, norm=NORM, rngs=nnx.Rngs(0))
        params = randomized(reduction)
        x = np.random.default_rng(1).normal(size=(2, *size, 3))
        y = apply(reduction, x)
    assert y.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 5)
    np.testing.assert_allclose(y, match_of(x, params, relu), rtol=1e-9, atol=1e-9)


def test_kernels_start_with_the_variance_of_their_fan_out() -> None:
    made = {"norm": NORM, "rngs": nnx.Rngs(0)}
    conv_part = ConvNorm(16, 64, size=(3, 5), **made)
    separable_part = SeparableNorm(512, 64, size=3, **made)
    for kernel, fan_out in [
        (conv_part.kernel, 3 * 5 * 64),
        (separable_part.depthwise, 3 * 3),
        (separable_part.pointwise, 64),
    ]:
        values = np.asarray(kernel[...])
        assert abs(values.mean()) < 0.1 * values.std()
        np.testing.assert_allclose(values.std(), np.sqrt(2 / fan_out), rtol=0.05)


def test_an_operation_computes_in_the_type_of_its_input() -> None:
    part = ConvNorm(3, 4, size=(3, 3), norm=NORM, rngs=nnx.Rngs(0))
    assert part.kernel[...].dtype == jnp.float32
    assert apply(part, jnp.ones((2, 5, 5, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_batch_norm_has_the_momentum_and_epsilon_it_is_told() -> None:
    norm = Normalization(momentum=0.25).make(4, nnx.Rngs(0))
    assert (norm.momentum, norm.epsilon, norm.axis_name) == (0.25, conv_norm.EPSILON, None)


def test_batch_norm_over_replicas_is_that_of_their_joint_batch() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype("float32")
    joint, alone = (
        ConvNorm(2, 4, norm=Normalization(axis_name=name), rngs=nnx.Rngs(0))
        for name in ("data", None)
    )
    graph, state = nnx.split(joint)
    each = jax.vmap(
        lambda state, x: nnx.merge(graph, state)(x), in_axes=(None, 0), axis_name="data"
    )(state, x)
    whole = apply(alone, x.reshape(6, 4, 4, 2))
    np.testing.assert_allclose(each.reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(each[0] - apply(alone, x[0])).max() > 0.01
