"""Check that pipelines of the papers' networks equal the sequential program.

Batch norm, dropout, drop-path, skips over stages and tied weights, against the sequential program
over the same micro-batches: loss, every gradient leaf, and the running statistics.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import linked
import numpy as np
import pytest
from helpers import assert_trees_close, widened
from linked import QUICK

import gpipe_jax as gpipe
from gpipe_jax import zoo

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("eager_1f1b", 1), ("interleaved", 1), ("interleaved", 2)]
CUTS = [(K, D, *s) for K, D, s in itertools.product((1, 2, 4), (1, 2), SCHEDULES)]
COUNT, MICRO_BATCHES = 32, 4  # examples; micro-batches on all replicas together


def amoebanet(genotype: str) -> list[gpipe.Layer]:
    """D has the auxiliary head too, whose scores cross the last stages; it needs larger images."""
    return zoo.amoebanet(
        genotype,
        layers=3,
        filters=8,
        image=16 if genotype == "D" else 8,
        auxiliary=genotype == "D",
        classes=5,
        in_channels=2,
        stem="cifar",
        drop_path=0.3,
        dropout=0.2,
        batch_norm_momentum=0.9,
        dtype=str(jnp.zeros(()).dtype),
    )


def images(*labels: int, size: int = 8) -> dict:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(COUNT, size, size, 2)) + rng.normal(size=(COUNT, 1, 1, 2))
    return {
        "inputs": inputs,
        "labels": rng.integers(0, 5, (COUNT, *labels)),
        "weights": rng.uniform(0.5, 2.0, COUNT),
    }


def tokens() -> dict:
    rng = np.random.default_rng(1)
    tokens, weights = rng.integers(0, 11, (COUNT, 6)), rng.uniform(0.5, 2.0, COUNT)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}


def pairs() -> dict:
    batch = tokens()
    source = np.random.default_rng(2).integers(0, 11, (COUNT, 7))
    return {**batch, "inputs": {"source": source, "target": batch["inputs"]}}


TRANSFORMER = dict(vocabulary=11, width=8, heads=2, feed_forward=12, dropout=0.2, tied=True)


def transformer() -> list[gpipe.Layer]:
    dtype = str(jnp.zeros(()).dtype)
    return zoo.transformer_lm(
        length=5, layers=6, positions="sinusoidal", dtype=dtype, **TRANSFORMER
    )  # type: ignore[arg-type]


def encoder_decoder() -> list[gpipe.Layer]:
    return zoo.encoder_decoder(layers=2, dtype=str(jnp.zeros(()).dtype), **TRANSFORMER)  # type: ignore[arg-type]


# Layers and a batch. The U-Net's skips cross up to 8 layers: 1 to 3 stages in the cuts below.
NETWORKS: dict[str, tuple[Callable, Callable]] = {
    **{f"amoebanet {g}": (functools.partial(amoebanet, g), images) for g in "ABC"},
    "amoebanet D": (functools.partial(amoebanet, "D"), functools.partial(images, size=16)),
    "resnet": (
        lambda: zoo.resnet((2, 2), width=4, classes=5, in_channels=2, stem="small"),
        images,
    ),
    "unet": (
        lambda: zoo.unet(depth=2, convolutions=1, channels=4, in_channels=2, classes=5),
        functools.partial(images, 8, 8),
    ),
    "tied transformer": (transformer, tokens),
    "tied encoder-decoder": (encoder_decoder, pairs),
}
LOSSES = {
    "amoebanet D": gpipe.losses.classification(label_smoothing=0.1, auxiliary_weight=0.4),
}
# The float32 tolerance. In AmoebaNet-D rounding alone is larger: the inputs' last digit moves a
# gradient leaf of the plain program by 1.3e-5. In float64 all networks agree within 1e-12.
TOLERANCE = dict.fromkeys(NETWORKS, 1e-5) | {"amoebanet D": 3e-5}
TOO_FEW_LAYERS = {f"amoebanet {g}": 7 for g in "ABC"}  # for 8 stages
# One cut for each kind of network, all different, by default; the rest of the grid is slow.
FAST = {
    ("resnet", 4, 2, "eager_1f1b", 1),
    ("tied encoder-decoder", 4, 2, "1f1b", 1),
}
FAST_DOUBLE = {
    ("unet", 4, 2, "1f1b", 1),
    ("tied transformer", 2, 2, "interleaved", 2),
}


@functools.cache
def reference(name: str, double: bool) -> tuple:
    with jax.enable_x64(double):
        make_layers, make_batch = NETWORKS[name]
        batch = make_batch()
        layers = widened(make_layers())
        return linked.run_sequential(layers, [batch], loss_of(name), M=MICRO_BATCHES, D=1)


def loss_of(name: str) -> Callable:
    return LOSSES.get(name, gpipe.losses.softmax_cross_entropy)


def check(name: str, K: int, D: int, kind: str, V: int, double: bool, tolerance: float) -> None:
    params, _, result, grads, stats = reference(name, double)
    make_layers, make_batch = NETWORKS[name]
    pipe = gpipe.Pipeline(
        widened(make_layers()),
        loss=loss_of(name),
        mesh=gpipe.make_mesh(stages=K, data=D),
        micro_batches=MICRO_BATCHES // D,
        schedule=kind,
        chunks=V,
        example=make_batch(),
        cost=[1.0] * len(make_layers()),
    )
    assert len(pipe.stages.geometry.layer_ranges) == K * V
    if name == "unet" and K * V > 1:
        assert max(crossed(pipe).values()) >= min(K * V - 2, 2)
    step = pipe.lower().compile(compiler_options=QUICK)
    state = pipe.from_layers(params, 1)
    ours = step(state, pipe.split(make_batch()), jnp.uint32(0))
    assert_trees_close(tuple(ours[0]), result, tolerance)
    assert_trees_close(pipe.to_layers(ours[1]), grads, tolerance)
    assert_trees_close(pipe.statistics(state._replace(stats=ours[2])), stats, min(tolerance, 1e-6))


def crossed(pipe: gpipe.Pipeline) -> dict[str, int]:
    """Skip -> how many stages it crosses without being used there."""
    count: dict[str, int] = {}
    for s in range(len(pipe.stages.geometry.layer_ranges)):
        for name in pipe.stages.geometry.input(s).skips:
            count[name] = count.get(name, 0) + (name in pipe.stages.geometry.passing(s))
    return count


def grid(fast: set) -> list[Any]:
    cases = [
        (name, *cut)
        for name, cut in itertools.product(NETWORKS, CUTS)
        if cut[0] * cut[3] <= TOO_FEW_LAYERS.get(name, 8)
    ]
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize(("name", "K", "D", "kind", "V"), grid(FAST))
def test_equivalence_float32(name: str, K: int, D: int, kind: str, V: int) -> None:
    check(name, K, D, kind, V, double=False, tolerance=TOLERANCE[name])


@pytest.mark.parametrize(("name", "K", "D", "kind", "V"), grid(FAST_DOUBLE))
def test_equivalence_float64(name: str, K: int, D: int, kind: str, V: int) -> None:
    with jax.enable_x64(True):
        check(name, K, D, kind, V, double=True, tolerance=1e-12)
