"""Compare the layers of an AmoebaNet with their definitions in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from operations_in_numpy import apply, batch_norm, conv_norm_of, match_of, pool, randomized

from gpipe_jax.genotypes.genotype import Cell
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.random_keys import apply_key
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.zoo.amoebanet import layers
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import AmoebaCell, AuxiliaryHead, Classifier, DropPath, Stem

NORM = Normalization()
# Both inputs are read, concatenated, and read with a stride; state 3 is read, 4 has one side of it.
CELL = Cell(
    pairs=(
        (("max_pool_3x3", 0), ("identity", 1)),
        (("avg_pool_3x3", 1), ("identity", 2)),
        (("conv_1x1", 3), ("max_pool_2x2", 0)),
    ),
    concat=(4, 1, 0, 2),
)


def definition(params: dict, x: np.ndarray, skip: np.ndarray, stride: int, first: bool) -> Any:
    """Compute the cell CELL."""
    op, out = (params.get(name, {}) for name in ("operations", "outputs"))
    h0 = conv_norm_of(x, params["enter"])
    h1 = x if first else match_of(skip, params.get("match", {}), relu=True)
    strided = (stride, stride)
    h2 = pool(h0, {}, stride, size=3, kind="max")
    h2 = h2 + (conv_norm_of(h1, op[1], strided) if 1 in op else h1)
    h3 = pool(h1, op.get(2, {}), stride, size=3, kind="avg") + h2
    h4 = conv_norm_of(h3, op[4]) + pool(h0, {}, stride, size=2, kind="max")
    parts = [match_of(h, out.get(i, {}), relu=False) for i, h in enumerate((h4, h1, h0, h2))]
    return np.concatenate(parts, -1)


CASES = [
    # in and skip features, stride, stride of the skip; (7, 6) pixels of x
    pytest.param(6, 6, 1, 1, id="skip of other width"),
    pytest.param(6, 4, 1, 1, id="skip as it is"),
    pytest.param(6, 5, 1, 2, id="behind a reduction"),
    pytest.param(6, 6, 2, 1, id="reduction"),
    pytest.param(6, 6, 2, 2, id="reduction behind a reduction"),
    pytest.param(6, None, 1, 1, id="first"),
    pytest.param(6, None, 2, 1, id="first, and a reduction"),
]


@pytest.mark.parametrize(("width", "skip_width", "stride", "skip_stride"), CASES)
def test_a_cell_computes_its_definition(
    width: int, skip_width: int | None, stride: int, skip_stride: int
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, width))
    skip = rng.normal(size=(2, 7 * skip_stride, 6 * skip_stride, skip_width or width))
    with jax.enable_x64(True):
        cell = AmoebaCell(
            CELL, 4, width, skip_width, stride=stride, skip_stride=skip_stride, norm=NORM,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        params = randomized(cell)
        y, kept = apply(cell, (x, skip) if skip_width else x, seed=0, progress=1.0)
    assert y.shape == (2, -(-7 // stride), 6 // stride, 4 * len(CELL.concat))
    np.testing.assert_array_equal(kept, x)
    wanted = definition(params, x, skip, stride, first=skip_width is None)
    np.testing.assert_allclose(y, wanted, rtol=1e-9, atol=1e-9)


def test_only_the_inputs_of_a_reduction_are_read_with_its_stride() -> None:
    cell = AmoebaCell(CELL, 4, 6, 6, stride=2, norm=NORM, rngs=nnx.Rngs(0))
    strides = [getattr(op, "stride", 1) for op in cell.operations]
    assert strides == [2, 2, 2, 1, 1, 2]


# --- drop path ------------------------------------------------------------------------------------


class Dropped(nnx.Module):
    """DropPath as a network's layer."""

    def __init__(self, rate: float) -> None:
        self.drop = DropPath(rate)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs, progress: Any) -> jax.Array:
        return self.drop(x, rngs=rngs, progress=progress)


def dropped(rate: float, progress: float, *, train: bool = True, **key: Any) -> np.ndarray:
    """Apply drop path to ones [2000, 2, 2, 3]."""
    examples = key.get("examples") or 2000
    context = Context(apply_key(jax.random.key(0), 0, **{"micro_batch": 0, **key}), train, progress)
    one = layer(Dropped, rate=rate)
    return np.asarray(one.apply({}, {}, jnp.ones((examples, 2, 2, 3)), context)[0])


@pytest.mark.parametrize(("rate", "progress"), [(0.8, 0.5), (0.4, 1.0), (0.3, 0.1)])
def test_whole_examples_are_dropped_with_the_rate_times_the_progress(
    rate: float, progress: float
) -> None:
    y = dropped(rate, progress)
    assert (y == y[:, :1, :1, :1]).all()
    kept = y[:, 0, 0, 0] > 0
    assert abs(kept.mean() - (1 - rate * progress)) < 0.05
    np.testing.assert_allclose(y[kept], 1 / (1 - rate * progress), rtol=1e-6)


@pytest.mark.parametrize(
    ("rate", "progress", "train"), [(0.8, 0.0, True), (0.0, 1.0, True), (0.8, 1.0, False)]
)
def test_nothing_is_dropped_at_the_start_or_in_evaluation(
    rate: float, progress: float, train: bool
) -> None:
    assert (dropped(rate, progress, train=train) == 1).all()


def test_with_keys_of_examples_what_is_dropped_depends_on_the_example_alone() -> None:
    whole = dropped(0.5, 1.0, examples=8)
    halves = [dropped(0.5, 1.0, micro_batch=i, examples=4) for i in range(2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    assert 0 < (whole == 0).mean() < 1


def test_a_cell_drops_every_operation_but_identities() -> None:
    """Nearly always: so what is left is the sum of the identities."""
    cell = Cell(
        pairs=((("identity", 0), ("max_pool_3x3", 1)), (("identity", 1), ("identity", 0))),
        concat=(2, 3),
    )
    made = AmoebaCell(cell, 4, 4, 4, drop_path=1 - 1e-9, norm=NORM, rngs=nnx.Rngs(0))
    x, skip = np.random.default_rng(0).normal(size=(2, 5, 4, 4, 4)).astype("float32")
    y, _ = apply(made, (x, skip), seed=0, progress=1.0)
    made.eval()
    made.enter.norm.use_running_average = False
    h0 = apply(made.enter, x)
    np.testing.assert_allclose(y, np.concatenate([h0, skip + h0], -1), rtol=1e-5, atol=1e-5)
    assert np.abs(apply(made, (x, skip), seed=0, progress=1.0)[0] - y).max() > 0.1


# --- the other layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding"), [(2, "VALID"), (2, "SAME"), (1, "SAME")])
def test_the_stem_is_a_convolution_and_batch_norm(stride: int, padding: str) -> None:
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3))
    with jax.enable_x64(True):
        kind = {"stride": stride, "padding": padding, "dtype": "float64"}
        stem = Stem(3, 5, norm=NORM, rngs=nnx.Rngs(0), **kind)
        params = randomized(stem)["conv"]
        y = apply(stem, x)
    inner = conv_norm_of(x, params, (1, 1), relu=False)
    if padding == "VALID":  # the places at which the kernel is inside
        raw = np.einsum("bijhwc,hwcf->bijf", sliding(x, 3)[:, ::2, ::2], params["kernel"])
        inner = batch_norm(raw, params["norm"])
    elif stride == 2:
        inner = conv_norm_of(x, params, (2, 2), relu=False)
    np.testing.assert_allclose(y, inner, rtol=1e-9, atol=1e-9)


def sliding(x: np.ndarray, size: int) -> np.ndarray:
    """Return all windows inside the image: [B, H - size + 1, W - size + 1, h, w, C]."""
    seen = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.moveaxis(seen, 3, -1)


def test_a_network_computes_in_the_type_of_its_stem() -> None:
    stem = Stem(3, 4, stride=1, padding="SAME", norm=NORM, dtype="bfloat16", rngs=nnx.Rngs(0))
    x = apply(stem, jnp.ones((2, 4, 4, 3)))
    cell = AmoebaCell(CELL, 4, 4, None, norm=NORM, rngs=nnx.Rngs(0))
    y, kept = apply(cell, x, seed=0, progress=1.0)
    assert (x.dtype, y.dtype, kept.dtype) == (jnp.bfloat16,) * 3
    classifier = Classifier(16, 3, rngs=nnx.Rngs(0))
    assert apply(classifier, (y, kept), seed=0).dtype == jnp.float32


def test_the_auxiliary_head_passes_the_boundary_on_and_classifies() -> None:
    rng = np.random.default_rng(0)
    x, skip = rng.normal(size=(4, 9, 9, 6)), rng.normal(size=(4, 2))
    with jax.enable_x64(True):
        head = AuxiliaryHead(6, 9, 3, norm=NORM, rngs=nnx.Rngs(0))
        params = randomized(head)
        boundary, scores = apply(head, (x, skip))
    pooled = sliding(np.maximum(x, 0), 5)[:, ::3, ::3].mean((3, 4))
    y = np.maximum(conv_norm_of(pooled, params["project"], relu=False), 0)
    raw = np.einsum("bhwc,hwcf->bf", y, params["whole"]["kernel"])
    y = np.maximum(batch_norm(raw[:, None, None], params["whole"]["norm"])[:, 0, 0], 0)
    wanted = y @ params["linear"]["kernel"] + params["linear"]["bias"]
    assert pooled.shape[1:3] == (2, 2) and y.shape == (4, layers.AUXILIARY_WIDTHS[1])
    np.testing.assert_allclose(scores, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(boundary[0], x)
    np.testing.assert_array_equal(boundary[1], skip)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_the_classifier_is_linear_in_the_mean_of_the_positive_features(auxiliary: bool) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 6))
    with jax.enable_x64(True):
        one = Classifier(6, 5, auxiliary=auxiliary, rngs=nnx.Rngs(0))
        params = randomized(one)["linear"]
        inputs = ((x, x[:1]), x[:2]) if auxiliary else (x, x[:1])
        scores = apply(one, inputs, seed=0)
    if auxiliary:
        scores, other = scores
        np.testing.assert_array_equal(other, x[:2])
    wanted = np.maximum(x, 0).mean((1, 2)) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(scores, wanted, rtol=1e-9, atol=1e-9)


def test_the_classifier_has_dropout_in_training_only() -> None:
    one = Classifier(6, 5, dropout=0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((4, 3, 2, 6))
    trained = apply(one, (x, x), seed=0)
    one.eval()
    evaluated = apply(one, (x, x), seed=0)
    assert np.abs(evaluated - evaluated[:1]).max() == 0 < np.abs(trained - trained[:1]).max()
