"""ResNet: its published sizes, a bottleneck against its definition, and its batch norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gpipe_jax import losses, sequential, zoo
from gpipe_jax.layers import random_keys
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import count_parameters, infer_shapes

IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
EPSILON = 1e-5  # of batch norm


def small() -> tuple[list[Layer], dict]:
    """Build a small ResNet and a batch: with and without a 1x1 convolution in the skip."""
    rng = np.random.default_rng(1)
    layers = zoo.resnet((2, 1), width=4, classes=5, in_channels=2, stem="small")
    inputs, labels = rng.normal(size=(4, 6, 6, 2)), rng.integers(0, 5, 4)
    return layers, {"inputs": inputs, "labels": labels, "weights": np.ones(4)}


@pytest.mark.parametrize(
    ("depths", "count"), [((3, 4, 6, 3), 25_557_032), ((3, 4, 23, 3), 44_549_160)]
)
def test_counts_of_resnet_50_and_101(depths: tuple[int, ...], count: int) -> None:
    """25.56M and 44.55M, as torchvision documents for 1000 classes."""
    layers = zoo.resnet(depths)
    assert count_parameters(layers, IMAGES) == count
    assert len(layers) == 3 * sum(depths) + 3


def test_the_resolution_is_halved_in_the_stem_and_between_groups() -> None:
    shapes = infer_shapes(zoo.resnet((2, 2, 1, 1), width=2), IMAGES)
    sizes = [s.boundary.x.shape[1:] for s in shapes]
    assert sizes[1:3] == [(112, 112, 2), (56, 56, 2)]
    assert sizes[5::3] == [(56, 56, 8), (56, 56, 8), (28, 28, 16), (28, 28, 16), (14, 14, 32),
                           (7, 7, 64)]  # fmt: skip
    assert shapes[-1].output.shape == (1, 1000)


def test_a_small_stem_keeps_the_resolution() -> None:
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    shapes = infer_shapes(zoo.resnet((1, 1), width=2, in_channels=1, stem="small"), images)
    assert [s.boundary.x.shape[1:3] for s in shapes[::3]] == [(8, 8), (8, 8), (4, 4)]


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(ValueError, match="`stem` is 'large': use 'imagenet' or 'small'"):
        zoo.resnet(stem="large")  # type: ignore[arg-type]


def test_equal_bottlenecks_have_equal_layers() -> None:
    layers = zoo.resnet((4,), stem="small")
    assert layers[4:7] == layers[7:10] == layers[10:13] != layers[1:4]


def convolved(part: dict, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution, and batch norm with fresh running statistics: mean 0 and variance 1."""
    kernel, axes = part["conv"]["kernel"], ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=axes)
    norm = part["norm"]
    return y / np.sqrt(1 + EPSILON) * norm["scale"][None] + norm["bias"][None]


@pytest.mark.parametrize(
    ("first", "stride", "changes"), [(1, 1, True), (4, 1, False), (7, 2, True)]
)
def test_a_bottleneck_is_its_definition(first: int, stride: int, changes: bool) -> None:
    layers = small()[0]
    x = jnp.zeros((2, 6, 6, 2))
    params, stats = sequential.init(layers, x)
    part = slice(first, first + 3)
    start, middle, end = jax.tree.map(lambda a: a + 0.1 if a.ndim == 1 else a, params[part])
    features = infer_shapes(layers, x)[first].input.shape[-1]
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, features))
    forward = jax.jit(lambda p: sequential.forward(
        layers[part], p, stats[part], x, jax.random.key(0), train=False
    ))  # fmt: skip
    y, relu = forward([start, middle, end])[0], jax.nn.relu
    inner = relu(convolved(middle, relu(convolved(start["reduce"], x)), stride))
    assert ("shortcut" in end) == changes
    skip = convolved(end["shortcut"], x, stride) if changes else x
    np.testing.assert_allclose(y, relu(convolved(end["expand"], inner) + skip), atol=1e-5)


def test_every_parameter_learns_and_statistics_keep_nine_tenths_of_themselves() -> None:
    layers, batch = small()
    batch = jax.tree.map(jnp.asarray, batch)
    params, stats = sequential.init(layers, batch["inputs"])
    step = jax.jit(sequential.value_and_grad(layers, losses.softmax_cross_entropy, 2))
    (loss, metrics), grads, moved = step(params, stats, batch, random_keys.step_key(0, 0))
    assert 0.5 < loss < 10 and 0 <= metrics["accuracy"] <= 1
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)
    for (path, a), b in zip(jax.tree.leaves_with_path(stats), jax.tree.leaves(moved), strict=True):
        assert np.isfinite(b).all() and np.abs(a - b).max() > 1e-6, jax.tree_util.keystr(path)
    axes = ("NHWC", "HWIO", "NHWC")
    kernel, x = params[0]["conv"]["kernel"], batch["inputs"].astype(jnp.float32)
    seen = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
    mean, var = seen.mean((0, 1, 2)), seen.var((0, 1, 2))
    np.testing.assert_allclose(moved[0]["norm"]["mean"], 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(moved[0]["norm"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
