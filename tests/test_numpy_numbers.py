"""Check that numbers of NumPy are accepted as settings, and mean what Python's mean."""

import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.config.optimizers import SgdConfig
from gpipe_jax.pipeline.pipeline import Pipeline

KINDS = [np.int64, np.int32, np.int8, np.uint8]
BATCH = {"inputs": np.zeros((8, 4), np.float32), "labels": np.zeros(8, np.int32)}


def build(**options) -> Pipeline:
    stages = options.pop("stages", 2)
    return gpipe.Pipeline(
        gpipe.zoo.mlp((4, 4, 4, 4, 3)),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=stages, data=options.pop("data", 1)),
        example=BATCH,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_a_pipeline(kind: type) -> None:
    numbers = {"stages": 2, "data": 2, "micro_batches": 2, "chunks": 2, "steps": 100}
    have, wanted = (
        build(schedule="interleaved", **{name: cast(n) for name, n in numbers.items()})
        for cast in (kind, int)
    )
    assert have.mesh == wanted.mesh
    np.testing.assert_array_equal(have.schedule.table, wanted.schedule.table)
    for name in ("micro_batches", "steps", "batch_size", "micro_batch_size"):
        assert getattr(have, name) == getattr(wanted, name)
        assert type(getattr(have, name)) is int, name


@pytest.mark.parametrize("kind", KINDS)
def test_counts_do_not_overflow(kind: type) -> None:
    """Check numbers whose sum an int of 8 bits cannot hold."""
    have = gpipe.schedules.make("interleaved", kind(4), kind(120), kind(2))
    np.testing.assert_array_equal(
        have.table, gpipe.schedules.make("interleaved", 4, 120, chunks=2).table
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batch_sizes_and_seeds(kind: type) -> None:
    batches = [
        next(gpipe.data.digits(batch_size=cast(100), seed=cast(3)).train(cast(2)))
        for cast in (kind, int)
    ]
    for name in ("inputs", "labels"):
        np.testing.assert_array_equal(*(batch[name] for batch in batches))


def test_fractions_and_bools() -> None:
    trainer = gpipe.Trainer(
        build(memory_limit=np.float32(1e9)), optax.sgd(0.1), ema=np.float32(0.5)
    )
    assert trainer.ema == 0.5
    config = SgdConfig(nesterov=np.True_, warmup_steps=np.int8(3), momentum=np.float64(0.5))
    assert config == SgdConfig(nesterov=True, warmup_steps=3, momentum=0.5)


def test_arguments_of_layers() -> None:
    """Check that equal layers are found whatever their numbers are."""
    have = gpipe.layer(nnx.Linear, in_features=np.int64(4), out_features=np.uint8(4))
    assert have == gpipe.layer(nnx.Linear, in_features=4, out_features=4)


def test_bools_of_numpy_are_no_counts() -> None:
    with pytest.raises(
        ValueError, match="`micro_batches` must be a whole number of at least 1, got"
    ):
        build(micro_batches=np.True_)
