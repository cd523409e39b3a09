"""Check groups of parameters by patterns: as `optax.multi_transform` on the layers' own trees."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from dense import assert_close, is_matrix, make_batch, make_pipe, plainly_trained, trained

import gpipe_jax as gpipe
from gpipe_jax.config.optimizers import AdamConfig, LionConfig, OptimizerConfig, SgdConfig
from gpipe_jax.errors import ArgumentError
from gpipe_jax.training.grouping.transformation import GroupedState


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def by_hand(params: list) -> list:
    """Return the groups of `PATTERNS`, of the leaves that are there."""
    return jax.tree.map_with_path(lambda path, _: _group(path[0].idx, path[1].key), params)


def _group(layer: int, name: str) -> int:
    if name == "bias":
        return 1
    return 2 if layer == 2 or name == "table" else 0


PATTERNS: tuple[tuple[str, ...], ...] = (("*.bias",), ("2", "scores"))


# --- from Python ----------------------------------------------------------------------------------


TRANSFORMATIONS = (optax.adamw(0.01, weight_decay=0.1), optax.sgd(0.1, 0.9), optax.lion(0.001))


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), tx)


@functools.cache
def expected_from_python(frozen: tuple[int, ...] = ()) -> list:
    by_group: Any = dict(enumerate(TRANSFORMATIONS))
    tx = optax.multi_transform(by_group, by_hand)
    return plainly_trained(clipped(tx), frozen)


LAYOUTS = [
    (2, 2, 1, "1f1b"),
    pytest.param(1, 1, 1, "1f1b", marks=pytest.mark.slow),
    pytest.param(4, 1, 1, "gpipe", marks=pytest.mark.slow),
    pytest.param(2, 1, 2, "interleaved", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("K", "D", "V", "schedule"), LAYOUTS)
@pytest.mark.parametrize("frozen", [pytest.param((), marks=pytest.mark.slow), (3,)])
def test_groups_in_any_layout(K: int, D: int, V: int, schedule: str, frozen: tuple) -> None:
    patterns = [str(i) for i in frozen] or None
    pipe = make_pipe(K, D, V, schedule=schedule, frozen=patterns)
    default, *others = TRANSFORMATIONS
    tx = gpipe.optimizers.grouped(pipe, default, dict(zip(PATTERNS, others, strict=True)))
    params, current = trained(pipe, clipped(tx))
    assert isinstance(current.opt_state, GroupedState)
    assert_close(params, expected_from_python(frozen))


def test_the_first_group_that_matches_counts() -> None:
    pipe = make_pipe()
    sgd, none = optax.sgd(0.1, 0.9), optax.set_to_zero()
    tx = gpipe.optimizers.grouped(pipe, sgd, {"1.bias": none, "*.bias": optax.sgd(1.0)})
    before, (after, _) = pipe.to_layers(pipe.init(seed=1)), trained(pipe, tx)
    np.testing.assert_array_equal(after[1]["bias"], before[1]["bias"])
    assert np.abs(after[2]["bias"] - before[2]["bias"]).max() > 1e-3


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"0": 1e-2}, r"`groups\['0'\]` must be an optax transformation, got float; give an opt"),
        (
            [("0", optax.sgd(0.1))],
            "`groups` must be a dict of transformations by pattern, got",
        ),
    ],
)
def test_groups_without_transformations(groups: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpipe.optimizers.grouped(make_pipe(), optax.sgd(0.1), groups)


def test_a_default_that_is_no_transformation() -> None:
    default: Any = optax.adam
    with pytest.raises(ArgumentError, match=r"`default` must be an optax .*; call it, as adam"):
        gpipe.optimizers.grouped(make_pipe(), default, {})


def test_a_pattern_that_matches_nothing() -> None:
    pipe = make_pipe(frozen=["3"])
    for pattern, hint in (("dens", "did you mean 'dense'"), ("3.bias", "match no parameter")):
        with pytest.raises(ArgumentError, match=f"`groups` has patterns .*{hint}"):
            gpipe.optimizers.grouped(pipe, optax.sgd(0.1), {pattern: optax.sgd(1.0)})


def test_a_state_with_groups_moves_to_another_layout(tmp_path: Path) -> None:
    def trainer(K: int) -> gpipe.Trainer:
        pipe = make_pipe(K)
        groups = {"*.bias": optax.sgd(0.1, 0.9)}
        return gpipe.Trainer(pipe, gpipe.optimizers.grouped(pipe, optax.adam(0.01), groups))

    one, other = trainer(1), trainer(2)
    current, _ = one.step(one.init(seed=1), make_batch(0))
    one.save(tmp_path / "saved", current)
    ends = [
        t.pipe.to_layers(t.step(state, make_batch(1))[0].state)
        for t, state in ((one, current), (other, other.load(tmp_path / "saved")))
    ]
    assert_close(*ends)


# --- from a config --------------------------------------------------------------------------------


def reference(
    preconditioner: Callable, clip: float, rates: tuple, decays: tuple, l2: tuple
) -> optax.GradientTransformation:
    """Return the same from optax alone."""
    before: Any = {n: optax.add_decayed_weights(each, is_matrix) for n, each in enumerate(l2)}
    after: Any = {
        n: optax.chain(
            preconditioner(),
            optax.add_decayed_weights(decay, is_matrix),
            optax.scale_by_learning_rate(rate),
        )
        for n, (rate, decay) in enumerate(zip(rates, decays, strict=True))
    }
    return optax.chain(
        optax.multi_transform(before, by_hand),
        optax.clip_by_global_norm(clip),
        optax.multi_transform(after, by_hand),
    )


KINDS: dict[str, tuple[type[OptimizerConfig], Callable]] = {
    "adamw": (AdamConfig, optax.scale_by_adam),
    "sgd": (SgdConfig, lambda: optax.trace(0.9)),
    "lion": (LionConfig, optax.scale_by_lion),
}


@pytest.mark.parametrize(
    ("kind", "K"),
    [
        pytest.param(kind, K, marks=() if (kind, K) == ("adamw", 2) else pytest.mark.slow)
        for kind in KINDS
        for K in (1, 2, 4)
    ],
)
def test_groups_of_a_config(kind: str, K: int) -> None:
    model, preconditioner = KINDS[kind]
    # optax keeps learning rates in float32, which holds powers of two.
    settings = {"learning_rate": 2**-5, "weight_decay": 0.125, "l2": 0.0625, "clip_norm": 0.5}
    groups = [
        {"match": PATTERNS[0], "learning_rate": 0.5},
        {"match": PATTERNS[1], "weight_decay": 0.0, "l2": 0.25},
    ]
    config = model.model_validate({**settings, "schedule": "constant", "groups": groups})
    pipe = make_pipe(K)
    params, _ = trained(pipe, gpipe.optimizers.build(config, 10, shapes=pipe.shapes))
    rates, decays, l2 = (2**-5, 0.5, 2**-5), (0.125, 0.125, 0.0), (0.0625, 0.0625, 0.25)
    assert_close(params, plainly_trained(reference(preconditioner, 0.5, rates, decays, l2)))


@pytest.mark.parametrize("setting", ["weight_decay", "l2"])
def test_a_decay_of_biases_is_refused(setting: str) -> None:
    config = AdamConfig.model_validate({"groups": [{"match": ["*.bias"], setting: 0.1}]})
    with pytest.raises(ArgumentError, match=f"gives group 1 a {setting}, but all its parameters"):
        gpipe.optimizers.build(config, 10, shapes=make_pipe().shapes)
