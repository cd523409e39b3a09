"""Frozen parameters: no gradient, no optimizer state, and the exact gradients of all others."""

from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest
from helpers import assert_trees_close
from linked import all_links, make_batch, run_sequential

import gpipe_jax as gpipe
from gpipe_jax.utils.trees import PyTree

PATTERNS = {
    "layers": ["2", "5"],
    "kernels": ["[136].linear.kernel"],
    "tied": ["0.table", "11.table", "*.bias"],
}


def pipeline(
    frozen: list[str] | None, K: int, D: int = 1, V: int = 1, **kwargs: Any
) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        helpers.widened(all_links()),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=K, data=D),
        example=make_batch(16),
        micro_batches=4,
        chunks=V,
        frozen=frozen,
        **kwargs,
    )


def is_frozen(name: str, i: int, path: tuple) -> bool:
    leaf, layer = path[-1].key, i
    return {
        "layers": layer in (2, 5),
        "kernels": layer in (1, 3, 6) and leaf == "kernel",
        "tied": leaf in ("table", "bias"),
    }[name]


def without_frozen(name: str, layers: list[PyTree]) -> list[PyTree]:
    return [
        jax.tree.map_with_path(lambda path, a, i=i: None if is_frozen(name, i, path) else a, tree)
        for i, tree in enumerate(layers)
    ]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("K", "D", "V", "schedule", "remat"),
    [
        (2, 2, 1, "1f1b", "stage"),
        pytest.param(4, 1, 1, "gpipe", "layer", marks=pytest.mark.slow),
        pytest.param(2, 1, 2, "interleaved", "stage", marks=pytest.mark.slow),
        pytest.param(1, 1, 1, "1f1b", "layer", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_all_others_are_exact(
    name: str, K: int, D: int, V: int, schedule: str, remat: str
) -> None:
    with jax.enable_x64(True):
        batch = make_batch(16)
        params, _, (loss, _), grads, stats = run_sequential(
            helpers.widened(all_links()), [batch], M=4, D=D
        )
        pipe = pipeline(PATTERNS[name], K, D, V, schedule=schedule, remat=remat)
        state = pipe.init(seed=1)
        (got, _), gradients, after = pipe.value_and_grad(state, batch)
        assert_trees_close(pipe.to_layers(state), params, 1e-12)
        np.testing.assert_allclose(got, loss, rtol=1e-12)
        expected = without_frozen(name, grads)
        assert len(jax.tree.leaves(expected)) < len(jax.tree.leaves(grads))
        assert_trees_close(pipe.to_layers(gradients), expected, 1e-12)
        assert_trees_close(pipe.statistics(after), stats, 1e-12)


def test_a_step_leaves_frozen_parameters_and_resumes_with_another_number_of_stages() -> None:
    pipe = pipeline(PATTERNS["layers"], 2)
    trainer = gpipe.Trainer(pipe, optax.adam(1e-2))
    current = trainer.init(seed=1)
    before = pipe.to_layers(current.state)
    current, _ = trainer.step(current, make_batch(16))
    after = pipe.to_layers(current.state)
    assert_trees_close(after[2], before[2], 0)
    assert np.abs(after[1]["linear"]["kernel"] - before[1]["linear"]["kernel"]).max() > 1e-3
    other = gpipe.Trainer(pipeline(PATTERNS["layers"], 4), optax.adam(1e-2))
    resumed = other.from_layers(trainer.to_layers(current), 1)
    assert_trees_close(other.pipe.to_layers(resumed.state), after, 0)
    assert "frozen)" in str(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen": ["Keap"]}, "did you mean 'Keep'"),
        ({"frozen": ["*"]}, "leaves no parameter to train"),
        ({"trainable": ["0"], "frozen": ["1"]}, "not both"),
        ({"frozen": ["0"]}, "which are one parameter, tied as 'table'"),
    ],
)
def test_wrong_patterns_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(gpipe.errors.ArgumentError, match=message):
        gpipe.Pipeline(
            all_links(),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=gpipe.make_mesh(stages=1),
            example=make_batch(4),
            **arguments,
        )
