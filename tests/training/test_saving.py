"""Check `Trainer.save` and `load`: bit for bit into any layout, and what is refused."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.checkpoint.export import export
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.errors import ArgumentError, ConfigError, SaveError
from gpipe_jax.training import from_config, run


def make_batches(start: int = 0) -> Iterator[dict]:
    for step in itertools.count(start):
        inputs = np.random.default_rng(step).normal(size=(8, 4)).astype(np.float32)
        yield {"inputs": inputs, "labels": (inputs.sum(1) > 0).astype(np.int32)}


class Block(nnx.Module):
    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, out, rngs=rngs)
        self.norm = nnx.BatchNorm(out, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.norm(self.linear(x)))


def make_trainer(
    stages: int = 2,
    *,
    data: int = 1,
    widths: tuple[int, ...] = (4, 6, 6, 5, 2),
    tx: Any = None,
    ema: float | None = 0.9,
    **options: Any,
) -> gpipe.Trainer:
    """Return a trainer of a network with batch norms."""
    pipe = gpipe.Pipeline(
        [gpipe.layer(Block, width=a, out=b) for a, b in itertools.pairwise(widths)],
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=stages, data=data),
        example=next(make_batches()),
        **{"micro_batches": 2, **options},
    )
    return gpipe.Trainer(pipe, optax.adam(1e-2) if tx is None else tx, ema=ema)


@pytest.fixture(scope="module")
def trainer() -> gpipe.Trainer:
    return make_trainer()


@pytest.fixture(scope="module")
def five(trainer, tmp_path_factory) -> tuple[Path, Any]:
    """Return the folder of a state after five steps, and the state layer by layer."""
    folder = tmp_path_factory.mktemp("saved") / "five"
    current = trainer.fit(trainer.init(3), make_batches(), 5)
    trainer.save(folder, current)
    assert trainer.step(current, next(make_batches()))[0].step == 6, "it stays usable"
    return folder, trainer.to_layers(trainer.load(folder))


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


LAYOUTS: dict[str, dict] = {
    "three stages, two replicas": {"stages": 3, "data": 2, "schedule": "gpipe"},
    "four stages": {"stages": 4},
    "chunks": {"stages": 2, "chunks": 2, "schedule": "interleaved"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_state_is_the_same_in_every_layout(five, tmp_path, layout):
    """Load, save and load again: parameters, statistics, average, moments, seed and counts."""
    folder, layers = five
    other = make_trainer(**layout)
    loaded = other.load(folder)
    assert loaded.step == 5 and int(loaded.state.seed) == 3
    assert_equal(other.to_layers(loaded), layers)
    names = {name.partition(".")[0] for layer in layers.layers.values() for name in layer}
    assert names == {"params", "statistics", "average", "optimizer"}
    assert any(jax.tree.leaves(layer["statistics"]) for layer in layers.layers.values())
    other.save(tmp_path / "again", loaded)
    again = make_trainer(1).load(str(tmp_path / "again" / "checkpoints" / "5"))
    assert_equal(make_trainer(1).to_layers(again), layers)


def test_training_goes_on_as_if_it_had_not_stopped(trainer, five):
    whole = trainer.fit(trainer.init(3), make_batches(), 8)
    resumed = trainer.fit(trainer.load(five[0]), make_batches(5), 8)
    assert_equal(trainer.to_layers(resumed), trainer.to_layers(whole))
    other = make_trainer(3)
    moved = other.fit(other.load(five[0]), make_batches(5), 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        other.to_layers(moved),
        trainer.to_layers(whole),
    )


def test_later_steps_join_and_the_newest_is_loaded(trainer, tmp_path):
    current = trainer.init(0)
    for steps in (2, 4):
        current = trainer.fit(current, make_batches(), steps)
        trainer.save(tmp_path, current)
    assert trainer.load(tmp_path).step == 4
    assert trainer.load(tmp_path / "checkpoints").step == 4
    assert trainer.load(tmp_path / "checkpoints" / "2").step == 2
    with pytest.raises(ArgumentError, match=r"has a checkpoint of step 4, and this state is of st"):
        trainer.save(tmp_path, trainer.load(tmp_path / "checkpoints" / "2"))


def test_the_same_step_is_replaced(trainer, tmp_path):
    for seed in (0, 1):
        trainer.save(tmp_path, trainer.init(seed))
    assert int(trainer.load(tmp_path).state.seed) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_a_failure_leaves_the_old_one(trainer, tmp_path, monkeypatch):
    trainer.save(tmp_path, trainer.init(0))

    def fails(*args: object) -> None:
        raise SaveError("no space")

    monkeypatch.setattr(Saver, "save", fails)
    with pytest.raises(SaveError, match="no space"):
        trainer.save(tmp_path, trainer.init(1))
    assert int(trainer.load(tmp_path).state.seed) == 0


def test_a_damaged_checkpoint_is_passed_over(trainer, tmp_path, capsys):
    trainer.save(tmp_path, trainer.init(0))
    trainer.save(tmp_path, trainer.fit(trainer.init(0), make_batches(), 1))
    (tmp_path / "checkpoints/1/state/0.safetensors").write_bytes(b"no")
    assert trainer.load(tmp_path).step == 0
    assert "0.safetensors has 2 bytes" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match=r"all checkpoints here are damaged.*warm_start takes"):
        trainer.load(tmp_path / "checkpoints/1")


# --- runs of a config ----------------------------------------------------------------------------

CONFIG = {
    "model": {"kind": "mlp", "features": [64, 12, 12, 10]},
    "data": {"kind": "digits", "batch_size": 24},
    "mesh": {"stages": 2},
    "optimizer": {"kind": "adamw"},
    "train": {"steps": 3, "eval_every": 3},
}


def test_the_checkpoint_of_a_run_is_loaded_from_python(tmp_path):
    assembly = from_config.assemble(gpipe.load(CONFIG), tmp_path / "run")
    run.train(assembly, lambda record: None)
    mine = assembly.trainer
    current = mine.fit(mine.load(tmp_path / "run"), assembly.dataset.train(3), 5)
    mine.save(tmp_path / "mine", current)
    whole = mine.fit(mine.init(0), assembly.dataset.train(0), 5)
    assert_equal(mine.to_layers(mine.load(tmp_path / "mine")), mine.to_layers(whole))
    with pytest.raises(
        ArgumentError, match=r"is the folder of a run of gpipe train, which resumes"
    ):
        mine.save(tmp_path / "run", current)
    with pytest.raises(ConfigError, match=r"is of trainer.save, .* train.init_from"):
        run.train(from_config.assemble(gpipe.load(CONFIG), tmp_path / "mine"), print)


def test_what_is_saved_is_exported(five, tmp_path):
    figures = export(five[0], tmp_path / "five.npz")
    assert figures["step"] == 5
    arrays = np.load(tmp_path / "five.npz")
    for i, layer in five[1].layers.items():
        for name, average in layer["average"].get("linear", {}).items():
            np.testing.assert_array_equal(arrays[f"layers.{i}.linear.{name}"], average)
    assert any("linear.kernel" in name for name in arrays)


# --- errors --------------------------------------------------------------------------------------


def test_a_folder_without_a_checkpoint(trainer, tmp_path):
    with pytest.raises(ArgumentError, match=r"`path` .*/none does not exist; give the folder of a"):
        trainer.load(tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"`path` .* has no checkpoint; give the folder of a"):
        trainer.load(tmp_path)


WRONG = {
    "another network": ({"widths": (4, 6, 7, 5, 2)}, r"layer 1: .* was float32\[.*, is float32\["),
    "fewer layers": ({"widths": (4, 6, 6)}, "unknown layer"),
    "another optimizer": (
        {"tx": optax.sgd(0.1)},
        r"the optimizer \(or what is frozen\) differs: [^;]*unknown optimizer\.0\.mu[^;]*;[^;]*;"
        r"[^;]*; and \d+ more;",
    ),
    "no average": ({"ema": None}, "unknown average"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_listed(five, settings, message):
    with pytest.raises(ArgumentError, match=rf"(?s){message}.*gpipe.warm_start takes the param"):
        make_trainer(1, **settings).load(five[0])


def test_a_state_that_is_not_finite_is_not_saved(trainer, tmp_path):
    current = trainer.init(0)
    params = jax.tree.map(lambda a: a * np.nan, current.state.params)
    broken = current._replace(state=current.state._replace(params=params))
    with pytest.raises(ArgumentError, match="`current`, of step 0, holds NaN or infinity"):
        trainer.save(tmp_path, broken)
    assert not (tmp_path / "checkpoints").exists()
