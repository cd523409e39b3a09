"""AmoebaNets as lists of layers: published sizes, structure, errors, gradients of every leaf."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax import losses, sequential
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Cell, Genotype
from gpipe_jax.layers import random_keys
from gpipe_jax.layers.shape_inference import count_parameters, infer_shapes
from gpipe_jax.zoo.amoebanet import conv_norm
from gpipe_jax.zoo.amoebanet.layers import AmoebaCell, AuxiliaryHead, Classifier
from gpipe_jax.zoo.amoebanet.network import amoebanet

# --- counts ---------------------------------------------------------------------------------------

# Genotype, layers, filters, and millions of parameters: with the genotype as published, and with
# the output of its cells made of the unused states alone. The first are those of
# https://arxiv.org/abs/1802.01548 (A), https://arxiv.org/abs/1811.06965 (B 512),
# https://arxiv.org/abs/1805.09501 (C 228) and of the AmoebaNets for mobile phones.
IMAGENET = [
    ("A", 18, 190, "86.72", "75.07"),
    ("A", 18, 448, "468.15", "405.80"),
    ("B", 18, 512, "557.28", "497.82"),
    ("C", 18, 228, "155.27", "123.17"),
    ("A", 12, 50, "5.09", "4.34"),
    ("B", 9, 62, "5.26", "4.65"),
    ("C", 12, 50, "6.35", "4.92"),
    ("C", 12, 44, "5.06", "3.90"),
]
CIFAR = [
    ("A", 18, 32, "2.57", "2.26"),
    ("A", 18, 36, "3.22", "2.83"),
    ("B", 18, 36, "2.84", "2.55"),
    ("B", 18, 128, "34.87", "31.28"),
]
# AmoebaNet-D of layers and filters: with torchgpipe's stem (its README says so, and the GPipe
# paper), and with AmoebaNet's.
GPIPE = [
    (18, 208, "81.5", "81.1"),
    (18, 416, "319.0", "317.5"),
    (18, 544, "542.7", "540.2"),
    (36, 544, "1055.8", "1053.3"),
    (72, 512, "1844.9", "1842.6"),
    (18, 256, "122.5", "121.9"),
    (18, 128, "31.7", "31.6"),
]


@pytest.fixture
def no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no part in shapes, and without them shapes are found ten times faster."""
    monkeypatch.setattr(nnx.RngStream, "__call__", lambda self: self.key[...])
    monkeypatch.setattr(conv_norm, "INIT", lambda key, shape: jnp.zeros(shape))


def millions(layers: list[gpipe.Layer], wanted: str) -> str:
    """Return the number of parameters with as many decimals as `wanted`."""

    @functools.cache
    def count(one: gpipe.Layer) -> int:
        params = jax.eval_shape(one.init, jax.random.key(0), None)
        return sum(a.size for a in jax.tree.leaves(params))

    return f"{sum(map(count, layers)) / 1e6:.{len(wanted.split('.')[1])}f}"


def strict(genotype: Genotype) -> Genotype:
    """Return the genotype whose cells give their unused states."""
    normal, reduction = (Cell.from_pairs(c.pairs) for c in (genotype.normal, genotype.reduction))
    return Genotype(normal, reduction)


@pytest.mark.usefixtures("no_random_numbers")
@pytest.mark.parametrize(("letter", "layers", "filters", "published", "unused"), IMAGENET)
def test_parameter_counts_for_imagenet(
    letter: str, layers: int, filters: int, published: str, unused: str
) -> None:
    size: dict[str, Any] = {"layers": layers, "filters": filters}
    assert millions(amoebanet(letter, **size), published) == published
    assert millions(amoebanet(strict(GENOTYPES[letter]), **size), unused) == unused


@pytest.mark.usefixtures("no_random_numbers")
@pytest.mark.parametrize(("letter", "layers", "filters", "published", "unused"), CIFAR)
def test_parameter_counts_for_cifar(
    letter: str, layers: int, filters: int, published: str, unused: str
) -> None:
    size = {"layers": layers, "filters": filters, "image": 32, "classes": 10, "stem": "cifar"}
    assert millions(amoebanet(letter, **size), published) == published
    assert millions(amoebanet(strict(GENOTYPES[letter]), **size), unused) == unused


@pytest.mark.usefixtures("no_random_numbers")
@pytest.mark.parametrize(("layers", "filters", "torchgpipe", "imagenet"), GPIPE)
def test_parameter_counts_of_the_gpipe_paper(
    layers: int, filters: int, torchgpipe: str, imagenet: str
) -> None:
    for stem, wanted in {"torchgpipe": torchgpipe, "imagenet": imagenet}.items():
        network = amoebanet("D", layers=layers, filters=filters, stem=stem)
        assert millions(network, wanted) == wanted


@pytest.mark.parametrize(("stem", "wanted"), [("torchgpipe", 4_970_488), ("cifar", 5_006_536)])
def test_parameter_counts_of_layers_that_each_take_the_output_of_the_one_before(
    stem: str, wanted: int
) -> None:
    network = amoebanet("D", layers=3, filters=96, image=32, stem=stem)
    assert count_parameters(network, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)) == wanted


# --- structure ------------------------------------------------------------------------------------


def cells(network: list[gpipe.Layer]) -> list[dict]:
    return [dict(a.kwargs) for a in network if a.module is AmoebaCell]  # type: ignore[attr-defined]


def test_the_stacks_of_gpipe_have_24_layers_of_which_equal_ones_are_equal() -> None:
    network = amoebanet("D", layers=18, filters=256)
    assert len(network) == 24 and len(set(network)) == 15
    for first in (3, 10, 17):  # of a stack; the two behind a reduction read other widths
        assert len(set(network[first : first + 2])) == 2
        assert len(set(network[first + 2 : first + 6])) == 1
    assert [cell["stride"] for cell in cells(network)] == [2, 2, *[1] * 6, 2, *[1] * 6, 2, *[1] * 6]
    assert [cell["features"] for cell in cells(network)] == [
        64, 128, *[256] * 6, 512, *[512] * 6, 1024, *[1024] * 6
    ]  # fmt: skip


def test_a_skip_has_the_resolution_of_the_input_but_behind_a_reduction() -> None:
    network = amoebanet("D", layers=3, filters=8, image=67, auxiliary=True)
    shapes = infer_shapes(network, jax.ShapeDtypeStruct((2, 67, 67, 3), jnp.float32))
    inputs = [s.boundary.x for s in shapes if s.layer.module is AmoebaCell]  # type: ignore[attr-defined]
    assert inputs[0].shape == (2, 33, 33, 32)
    sizes = [[a.shape[1] for a in pair] for pair in inputs[1:]]
    assert sizes == [[17, 33], [9, 17], [9, 9], [5, 9], [5, 5], [3, 5]]
    assert [tuple(a.shape for a in s.output) for s in shapes[-1:]] == [((2, 1000), (2, 1000))]


def test_the_auxiliary_head_stands_behind_the_second_stack() -> None:
    network = amoebanet("D", layers=6, filters=8, image=32, stem="cifar", auxiliary=True)
    names = [a.module.__name__ for a in network]  # type: ignore[attr-defined]
    assert names == [
        "Stem",
        *["AmoebaCell"] * 5,
        "AuxiliaryHead",
        *["AmoebaCell"] * 3,
        "Classifier",
    ]
    assert network[6].stashes == network[-1].pops == ("auxiliary",)


def test_drop_path_rises_linearly_from_cell_to_cell() -> None:
    rates = [cell["drop_path"] for cell in cells(amoebanet("D", layers=3, drop_path=0.7))]
    np.testing.assert_allclose(rates, 0.1 * np.arange(1, 8))


def test_batch_norm_is_over_the_replicas_where_asked() -> None:
    for sync, axis in ((False, None), (True, "data")):
        network = amoebanet("D", layers=3, sync_batch_norm=sync, batch_norm_momentum=0.5)
        norms = [dict(a.kwargs).get("norm") for a in network[:-1]]  # type: ignore[attr-defined]
        assert norms == [conv_norm.Normalization(0.5, axis)] * 8


def test_a_letter_stands_for_the_published_genotype() -> None:
    assert amoebanet("B", filters=16) == amoebanet(GENOTYPES["B"], filters=16)
    assert amoebanet("B", filters=16) != amoebanet("A", filters=16)


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    ({"genotype": "E"}, "`genotype` is 'E', but the published ones are A, B, C, D; give one"),
    ({"layers": 17}, "`layers` is 17, but .* three equal stacks; give a multiple of 3, as 18"),
    ({"layers": 0}, "`layers` must be a whole number of at least 1, got 0"),
    ({"classes": 0}, "`classes` must be a whole number of at least 1, got 0"),
    ({"in_channels": 0}, "`in_channels` must be a whole number of at least 1, got 0"),
    ({"stem": "mnist"}, "`stem` is 'mnist', but the known stems are imagenet, torchgpipe, cifar"),
    ({"filters": 7}, "`filters` is 7, but .* stem 'imagenet' means 8 filters; give at least 8"),
    ({"filters": 3, "stem": "torchgpipe"}, "stem 'torchgpipe' means 4 filters"),
    ({"filters": 1, "stem": "cifar"}, "stem 'cifar' means 2 filters"),
    ({"drop_path": 1.0}, "`drop_path` must be at least 0 and less than 1, got 1.0"),
    ({"dropout": -0.1}, "`dropout` must be at least 0 and less than 1, got -0.1"),
    (
        {"batch_norm_momentum": 1.5},
        "`batch_norm_momentum` must be .* less than 1, got 1.5",
    ),
    ({"image": 0}, "`image` must be a whole number of at least 1, got 0"),
    (
        {"image": 18},
        "`image` is 18, but cell 16 of 22 halves its input, which would be 1x1; give 19 or",
    ),
    ({"image": 2, "stem": "cifar"}, "`image` is 2, but cell 14 of 20 .* 1x1; give 3 or more"),
    (
        {"image": 8, "stem": "cifar", "auxiliary": True},
        "auxiliary head pools 5x5 of its input, which would be 4x4; give 9 or more",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors_name_the_argument_the_rule_and_the_remedy(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        amoebanet(**wrong)


def test_the_image_that_an_error_asks_for_is_large_enough() -> None:
    for image, stem in ((19, "imagenet"), (17, "torchgpipe"), (3, "cifar")):
        amoebanet(image=image, stem=stem)
        with pytest.raises(ValueError, match=f"give {image} or more"):
            amoebanet(image=image - 1, stem=stem)


# --- training -------------------------------------------------------------------------------------

LOSS = losses.classification(auxiliary_weight=0.4)
EVERYTHING: dict[str, Any] = {
    "layers": 3, "filters": 8, "image": 16, "classes": 4, "stem": "cifar",
    "auxiliary": True, "drop_path": 0.3, "dropout": 0.3,
}  # fmt: skip


@pytest.fixture
def quick_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the forms of convolutions and pools for other platforms: they are fewer operations."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, **forms: forms["default"](*a))


def run(function: Callable, *args: Any) -> Any:
    """`function` compiled without optimisation, which halves the time for these networks."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})(*args)


def make_batch() -> dict:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 16, 16, 3)).astype("float32")
    return {"inputs": images, "labels": rng.integers(0, 4, 4), "weights": np.ones(4, "float32")}


def one_of_each(letter: str) -> list[gpipe.Layer]:
    """Build a network with one normal and one reduction cell, and every option."""
    start = amoebanet(letter, **EVERYTHING)[:3]
    width = cells(start)[-1]["features"] * len(GENOTYPES[letter].reduction.concat)
    end = {"in_features": width, "classes": 4}
    norm = conv_norm.Normalization()
    head = gpipe.layer(AuxiliaryHead, size=8, norm=norm, **end).stash("auxiliary")
    last = gpipe.layer(Classifier, dropout=0.3, auxiliary=True, **end).pop("auxiliary")
    return [*start, head, last]


def random_values(one: gpipe.Layer, seed: int) -> tuple[Any, Any]:
    """Parameters and running statistics, of which random values below 1 are as good as any."""
    rng = np.random.default_rng(seed)
    shapes = [
        jax.eval_shape(one.init, jax.random.key(0), None),
        jax.eval_shape(one.init_statistics),
    ]
    return jax.tree.map(lambda a: rng.uniform(0.1, 1, a.shape).astype(a.dtype), tuple(shapes))


def assert_all_new(old: Any, new: Any) -> None:
    """Check that every leaf is finite, and other than the old one."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for (path, a), b in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(a).all(), f"{name} is not finite"
        assert np.abs(a - b).max() > 1e-6, f"{name} is the old one"


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    "letter", [pytest.param(a, marks=() if a == "D" else pytest.mark.slow) for a in GENOTYPES]
)
def test_gradients_and_statistics_reach_every_leaf_of_both_cells(letter: str) -> None:
    network, batch = one_of_each(letter), make_batch()
    params, stats = (list(a) for a in zip(*map(random_values, network, range(5)), strict=True))

    def loss(params: list, stats: list, key: jax.Array) -> tuple:
        x = batch["inputs"]
        out, moments = sequential.forward(network, params, stats, x, key, train=True, progress=0.5)
        return LOSS(out, batch["labels"])[0].sum(), moments

    grads, moments = run(jax.grad(loss, has_aux=True), params, stats, random_keys.step_key(0, 0))
    assert_all_new(jax.tree.map(np.zeros_like, params), grads)
    assert_all_new(jax.tree.map(np.zeros_like, stats), moments)


@pytest.mark.slow
@pytest.mark.parametrize("letter", GENOTYPES)
def test_a_step_of_a_network_reaches_every_leaf(letter: str) -> None:
    network, batch = amoebanet(letter, **EVERYTHING), make_batch()
    params, stats = run(lambda x: sequential.init(network, x), batch["inputs"][:1])
    stats = jax.tree.map(lambda a: a + 1, stats)  # the mean of some is zero at the start
    step = sequential.value_and_grad(network, LOSS, micro_batches=1)
    (loss, _), grads, committed = run(step, params, stats, batch, random_keys.step_key(0, 0), 0.5)
    assert np.isfinite(loss)
    assert_all_new(jax.tree.map(np.zeros_like, params), grads)
    assert_all_new(stats, committed)


@pytest.mark.usefixtures("quick_to_compile")
def test_evaluation_differs_from_training() -> None:
    network, images = one_of_each("D"), make_batch()["inputs"]
    params, stats = zip(*map(random_values, network, range(5)), strict=True)

    def both(params: list, stats: list, x: jax.Array) -> list:
        forward = functools.partial(sequential.forward, network, params, stats, x)
        return [forward(random_keys.step_key(0, 0), train=train)[0] for train in (True, False)]

    trained, evaluated = run(both, list(params), list(stats), images)
    for a, b in zip(trained, evaluated, strict=True):
        assert np.isfinite(b).all() and np.abs(a - b).max() > 0.01
