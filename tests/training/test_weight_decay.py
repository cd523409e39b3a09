"""Check which parameters decay in a pipeline, whatever their shapes and however they are stored."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.training import optimizers
from gpipe_jax.utils.trees import PyTree

WIDTH = 8
ATTENTION = [
    gpipe.layer(nnx.MultiHeadAttention, num_heads=2, in_features=WIDTH, decode=False),
    gpipe.layer(nnx.LayerNorm, num_features=WIDTH),
    gpipe.layer(nnx.Linear, in_features=WIDTH, out_features=WIDTH),
    gpipe.layer(nnx.MultiHeadAttention, num_heads=2, in_features=WIDTH, decode=False),
]


def square(name: str) -> gpipe.Layer:
    """Return a layer with one matrix of that name."""

    def init(key: jax.Array, x: PyTree) -> dict:
        return {name: jax.random.normal(key, (WIDTH, WIDTH))}

    return gpipe.layer(init, APPLY[name])


APPLY: dict[str, Callable] = {
    "kernel": lambda params, x: x @ params["kernel"],
    "bias": lambda params, x: x + params["bias"],
    "scale": lambda params, x: x * params["scale"],
}


def decayed(layers: list, stages: int, **options) -> tuple[gpipe.Pipeline, list[PyTree]]:
    """Return the parameters, all 1 at first, after a step of nothing but a decay by a tenth."""
    inputs = np.ones((4, WIDTH, WIDTH), np.float32)
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=stages),
        example={"inputs": inputs, "labels": inputs},
        micro_batches=2,
        **options,
    )
    ones = jax.tree.map(np.ones_like, pipe.to_layers(pipe.init(0)))
    tx = optax.chain(optax.scale(0.0), optimizers.weight_decay(-0.1))
    trainer = gpipe.Trainer(pipe, tx)
    current, _ = trainer.step(
        trainer.start(pipe.from_layers(ones)), {"inputs": inputs, "labels": inputs}
    )
    return pipe, pipe.to_layers(current.state)


def assert_only_kernels_decayed(trees: list[PyTree]) -> None:
    for path, a in jax.tree.leaves_with_path(trees):
        is_kernel = "kernel" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, 0.9 if is_kernel else 1.0, err_msg=str(path), rtol=1e-6)


@pytest.mark.parametrize("stages", [4, *(pytest.param(K, marks=pytest.mark.slow) for K in (1, 2))])
def test_biases_of_attention_heads_do_not_decay(stages):
    _, trees = decayed(ATTENTION, stages)
    shapes = [a.shape for path, a in jax.tree.leaves_with_path(trees) if "bias" in str(path)]
    assert (2, 4) in shapes
    assert_only_kernels_decayed(trees)


def test_a_slot_may_hold_what_decays_and_what_does_not():
    """Check stages that have arrays of equal shape in one slot, with different meanings."""
    names = ("kernel", "bias", "scale", "kernel")
    pipe, trees = decayed([square(name) for name in names], 4)
    assert [len(storage.slots) for storage in pipe.stages.params] == [1]
    assert_only_kernels_decayed(trees)


def test_likewise_in_chunks():
    names = ("kernel", "bias", "kernel", "kernel")
    pipe, trees = decayed(
        [square(name) for name in names], 2, schedule="interleaved", chunks=2, partition=[1, 2, 3]
    )
    first, second = (storage.mask_slots(optimizers.decays) for storage in pipe.stages.params)
    assert second == [True], "one bool where the stages agree"
    np.testing.assert_array_equal(jnp.asarray(first[0]).ravel(), [True, False])
    assert_only_kernels_decayed(trees)
