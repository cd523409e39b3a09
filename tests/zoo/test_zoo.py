"""Test the zoo's networks: the number of layers, what goes in and out, and errors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from gpipe_jax import zoo
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import infer_shapes

CASES: dict[str, tuple[Callable[[], list[Layer]], jax.ShapeDtypeStruct, int, tuple[int, ...]]] = {
    "convnet": (
        lambda: zoo.convnet((4, 8), (2, 3), in_channels=3, classes=7),
        jax.ShapeDtypeStruct((2, 9, 8, 3), jnp.float32),
        1 + 5 + 1,
        (2, 7),
    ),
    "convnet of one group": (
        lambda: zoo.convnet([5], [1]),
        jax.ShapeDtypeStruct((2, 3, 3, 1), jnp.float32),
        3,
        (2, 10),
    ),
    "transformer": (
        lambda: zoo.transformer_lm(
            vocabulary=11, length=6, width=8, heads=2, feed_forward=12, layers=3
        ),
        jax.ShapeDtypeStruct((2, 6), jnp.int32),
        3 + 2,
        (2, 6, 11),
    ),
    "mlp": (
        lambda: zoo.mlp((12, 5, 4)),
        jax.ShapeDtypeStruct((2, 3, 4), jnp.float32),
        2,
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layers_and_shapes(name: str) -> None:
    make, x, count, output = CASES[name]
    layers = make()
    shapes = infer_shapes(layers, x)
    assert len(layers) == count
    assert (shapes[-1].output.shape, shapes[-1].output.dtype) == (output, jnp.float32)
    assert make() == layers


@pytest.mark.parametrize("name", zoo.MODELS)
def test_defaults_fit_together(name: str) -> None:
    tokens, images = jnp.zeros((2, 128), jnp.int32), jnp.zeros((2, 32, 32, 3))
    inputs = {
        "convnet": images[..., :1],
        "transformer_lm": tokens,
        "mlp": images[:, :8, :8, 0],
        "encoder_decoder": {"source": tokens, "target": tokens},
        "unet": images,
        "resnet": images,
        "amoebanet": jnp.zeros((2, 224, 224, 3)),
    }[name]
    shapes = infer_shapes(zoo.MODELS[name](), inputs)
    assert shapes[-1].output.shape[0] == 2


def test_a_convnet_halves_its_resolution_in_every_group_but_the_first() -> None:
    layers = zoo.convnet((4, 8, 16), (1, 2, 2))
    shapes = infer_shapes(layers, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    assert [s.output.shape for s in shapes[:-1]] == [
        (1, 8, 8, 4),
        (1, 8, 8, 4),
        (1, 4, 4, 8),
        (1, 4, 4, 8),
        (1, 2, 2, 16),
        (1, 2, 2, 16),
    ]


def test_repeated_layers_are_equal_and_so_share_one_compiled_body() -> None:
    blocks = zoo.transformer_lm(layers=5)[1:-1]
    assert len(blocks) == 5 and len(set(blocks)) == 1
    assert len(set(zoo.convnet((4, 8), (3, 4))[1:-1])) == 3  # plain, first of 8, plain of 8


def test_only_the_last_dense_layer_is_linear() -> None:
    assert [dict(one.kwargs)["last"] for one in zoo.mlp((3, 4, 5, 6))] == [False, False, True]  # type: ignore[attr-defined]


def test_widths_and_depths_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 `widths` but 3 `depths`; give as many of both"):
        zoo.convnet((4, 8), (1, 1, 1))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="`width` 10 is not a multiple of `heads` 4"):
        zoo.transformer_lm(width=10, heads=4)
