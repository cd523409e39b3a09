"""Frozen parameters: no gradient, no optimizer state, and the exact gradients of all others."""

from typing import Any

import helpers
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close
from linked import all_links, make_batch, run_sequential, without_norm

import gpipe_jax as gpipe
from gpipe_jax.utils.trees import PyTree

PATTERNS = {
    "layers": ["2", "5"],
    "kernels": ["[136].linear.kernel"],
    "tied": ["0.table", "11.table", "*.bias"],
}
PATTERNS["all"] = [pattern for patterns in PATTERNS.values() for pattern in patterns]
LAYOUTS = [
    (2, 2, 1, "1f1b", "stage"),
    (4, 1, 1, "gpipe", "layer"),
    (2, 1, 2, "interleaved", "stage"),
    (1, 1, 1, "1f1b", "layer"),
]


def pipeline(
    frozen: list[str], K: int, D: int = 1, V: int = 1, layers: Any = None, **kwargs: Any
) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers or helpers.widened(all_links()),
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
    by_name = {
        "layers": layer in (2, 5),
        "kernels": layer in (1, 3, 6) and leaf == "kernel",
        "tied": leaf in ("table", "bias"),
    }
    return any(by_name.values()) if name == "all" else by_name[name]


def without_frozen(name: str, layers: list[PyTree]) -> list[PyTree]:
    return [
        jax.tree.map_with_path(lambda path, a, i=i: None if is_frozen(name, i, path) else a, tree)
        for i, tree in enumerate(layers)
    ]


@pytest.mark.parametrize(
    ("name", "K", "D", "V", "schedule", "remat"),
    [
        pytest.param(name, *layout, marks=() if (name, i) == ("all", 0) else pytest.mark.slow)
        for name in PATTERNS
        for i, layout in enumerate(LAYOUTS)
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
    layers = without_norm()  # of which the second is frozen
    pipe = pipeline(["1"], 2, layers=layers)
    trainer = gpipe.Trainer(pipe, optax.adam(1e-2))
    current = trainer.init(seed=1)
    before = pipe.to_layers(current.state)
    current, _ = trainer.step(current, make_batch(16))
    after = pipe.to_layers(current.state)
    assert_trees_close(after[1], before[1], 0)
    assert np.abs(after[2]["linear"]["kernel"] - before[2]["linear"]["kernel"]).max() > 1e-3
    other = gpipe.Trainer(pipeline(["1"], 4, layers=layers), optax.adam(1e-2))
    resumed = other.from_layers(trainer.to_layers(current), 1)
    assert_trees_close(other.pipe.to_layers(resumed.state), after, 0)
    assert "frozen)" in str(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen": ["Keap"]}, "did you mean 'Keep'"),
        (
            {"frozen": "Keep"},
            r"must be a list of patterns, got 'Keep'; put the pattern into",
        ),
        ({"trainable": [0]}, "match no parameter: 0, which is no text"),
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


def test_the_compiled_step_has_no_gradient_and_no_optimizer_state_of_frozen_parameters() -> None:
    """Check the compiler's count of bytes: of two kernels on each device, one is frozen."""
    width = 128
    example = {"inputs": np.zeros((4, width), np.float32), "labels": np.zeros(4, np.int32)}

    def compiled(**options: Any) -> Any:
        pipe = gpipe.Pipeline(
            [gpipe.layer(nnx.Linear, in_features=width, out_features=width, use_bias=False)] * 4,
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=gpipe.make_mesh(stages=2),
            example=example,
            micro_batches=2,
            **options,
        )
        return gpipe.Trainer(pipe, optax.adam(1e-2)).lower().compile().memory_analysis()

    whole, frozen = compiled(), compiled(frozen=["0", "2"])
    kernel = 4 * width**2
    slots = whole.argument_size_in_bytes - frozen.argument_size_in_bytes
    assert abs(slots - 2 * kernel) < 1000  # the two moments of Adam
    assert whole.output_size_in_bytes - frozen.output_size_in_bytes > 1.9 * kernel
    assert whole.temp_size_in_bytes - frozen.temp_size_in_bytes > 0.9 * kernel  # the gradient
