"""U-Net: sizes of torchgpipe's benchmarks, the ways down and up, and the skips between them."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpipe_jax import losses, sequential, zoo
from gpipe_jax.layers import random_keys
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.zoo.unet import Down, Up

RNG = np.random.default_rng(0)


def small() -> tuple[list[Layer], dict]:
    """Build a small U-Net of two levels and a batch: the outer skip passes over the inner one."""
    rng = np.random.default_rng(1)
    layers = zoo.unet(depth=2, convolutions=1, channels=4, in_channels=2, classes=3)
    inputs, labels = rng.normal(size=(4, 8, 4, 2)), rng.integers(0, 3, (4, 8, 4))
    return layers, {"inputs": inputs, "labels": labels, "weights": np.ones(4)}


def torchgpipe_count(B: int, C: int, depth: int = 5) -> int:
    """Parameters of torchgpipe's U-Net, whose convolutions have no bias and no norm parameters."""

    def cell(first: int, middle: int, last: int) -> int:
        widths = [first, *[middle] * (B - 1), last]
        return sum(9 * a * b for a, b in pairwise(widths))

    down = [cell(C * 2 ** (i - 1) if i else 3, C * 2**i, C * 2**i) for i in range(depth)]
    up = [cell(C * 2 ** (i + 1), C * 2**i // 2, C * 2**i // 2) for i in range(depth)]
    return sum(down) + cell(C * 2**depth // 2, C * 2**depth, C * 2**depth // 2) + sum(up) + C // 2


@pytest.mark.parametrize(
    ("convolutions", "channels", "printed"),
    [
        (6, 72, "362.2M"),
        (11, 128, "2.21B"),
        (24, 128, "4.99B"),
        (24, 160, "7.80B"),
        (48, 160, "15.82B"),
    ],
)
def test_counts_are_those_of_torchgpipe_as_printed(
    convolutions: int, channels: int, printed: str
) -> None:
    """torchgpipe, benchmarks/unet-memory; batch norm adds two parameters for each of its inputs."""
    layers = zoo.unet(convolutions=convolutions, channels=channels)
    shapes = infer_shapes(layers, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    count = sum(a.size for s in shapes for a in jax.tree.leaves(s.params))
    norms = sum(a.size for s in shapes for a in jax.tree.leaves(s.params) if a.ndim == 1)
    assert count - norms == torchgpipe_count(convolutions, channels)
    assert printed == (f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.2f}B")


def test_each_convolution_is_a_layer() -> None:
    layers = zoo.unet(depth=3, convolutions=4, channels=2)
    assert len(layers) == 4 * (3 + 1 + 3) + 3 + 3 + 1
    x = jax.ShapeDtypeStruct((2, 16, 8, 3), jnp.float32)
    assert infer_shapes(layers, x)[-1].output.shape == (2, 16, 8, 1)


def test_a_level_halves_the_resolution_and_doubles_the_features() -> None:
    shapes = infer_shapes(small()[0], jax.ShapeDtypeStruct((1, 8, 4, 2), jnp.float32))
    assert [s.boundary.x.shape[1:] for s in shapes] == [
        (8, 4, 2), (8, 4, 4), (4, 2, 4), (4, 2, 8), (2, 1, 8), (2, 1, 8),
        (4, 2, 16), (4, 2, 4), (8, 4, 8), (8, 4, 2),
    ]  # fmt: skip
    assert {name: a.shape[1:] for name, a in shapes[5].boundary.skips.items()} == {
        "level 0": (8, 4, 4),
        "level 1": (4, 2, 8),
    }


def test_down_takes_maxima_of_squares_and_keeps_its_input() -> None:
    x = jnp.asarray(RNG.normal(size=(2, 4, 6, 3)))
    y, kept = Down(1)(x)
    np.testing.assert_array_equal(y, x.reshape(2, 2, 2, 3, 2, 3).max((2, 4)))
    np.testing.assert_array_equal(kept, x)


def test_up_repeats_pixels_and_puts_the_skip_behind() -> None:
    x, popped = RNG.normal(size=(2, 2, 3, 4)), RNG.normal(size=(2, 4, 6, 1))
    y = np.asarray(Up()((jnp.asarray(x), jnp.asarray(popped))), float)
    assert y.shape == (2, 4, 6, 5)
    for i, j in np.ndindex(4, 6):
        np.testing.assert_allclose(y[:, i, j, :4], x[:, i // 2, j // 2], rtol=1e-6)
    np.testing.assert_allclose(y[..., 4:], popped, rtol=1e-6)


def test_scores_depend_on_the_skip_and_on_what_it_skips() -> None:
    """Read deep features first, then the skip, in the convolution after the last way up."""
    layers, batch = small()
    x = jnp.asarray(batch["inputs"])
    params, stats = sequential.init(layers, x)
    last = len(layers) - 2
    kernel = params[last]["conv"]["kernel"]
    assert kernel.shape == (3, 3, 4 + 4, 2)

    @jax.jit
    def gradient(kernel: jax.Array) -> jax.Array:
        """Return the largest |d sum / d x| of the scores with respect to the input."""
        changed = [*params[:last], {**params[last], "conv": {"kernel": kernel}}, params[-1]]

        def total(x: jax.Array) -> jax.Array:
            key = jax.random.key(0)
            return sequential.forward(layers, changed, stats, x, key, train=False)[0].sum()

        return jnp.abs(jax.grad(total)(x)).max()

    assert gradient(kernel.at[:, :, :4].set(0)) > 1e-4  # through the skip alone
    assert gradient(kernel.at[:, :, 4:].set(0)) > 1e-4  # through the deeper levels alone
    assert gradient(jnp.zeros_like(kernel)) == 0


def test_every_parameter_learns_and_every_statistic_moves() -> None:
    layers, batch = small()
    batch = jax.tree.map(jnp.asarray, batch)
    params, stats = sequential.init(layers, batch["inputs"])
    step = jax.jit(sequential.value_and_grad(layers, losses.softmax_cross_entropy, 2))
    (loss, _), grads, moved = step(params, stats, batch, random_keys.step_key(0, 0))
    assert 0.5 < loss < 10
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)
    for (path, a), b in zip(jax.tree.leaves_with_path(stats), jax.tree.leaves(moved), strict=True):
        assert np.isfinite(b).all() and np.abs(a - b).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("size", "padded"), [((12, 8), "16 x 8"), ((8, 9), "8 x 16")])
def test_images_that_cannot_be_halved_are_refused(size: tuple[int, int], padded: str) -> None:
    height, width = size
    rule = f"images of {height} x {width} cannot be halved 3 times: both must be multiples of 8"
    remedy = f"pad them to {padded}, or use a smaller depth"
    with pytest.raises(ValueError, match=rf"layer 1, Down\(halvings=3\).*{rule}; {remedy}"):
        x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        infer_shapes(zoo.unet(depth=3, convolutions=1, channels=2), x)


def test_odd_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="`channels` is 7, but the last level has half of them"):
        zoo.unet(channels=7)
