"""Check `train.init_from` of a config: a new run starts with another one's parameters."""

import shutil

import jax
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.errors import ConfigError, SectionError, StoppedError
from gpipe_jax.training import from_config, run

CONFIG = {
    "model": {"kind": "mlp", "features": [64, 12, 12, 10]},
    "data": {"kind": "digits", "batch_size": 24},
    "mesh": {"stages": 2},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},
    "train": {"steps": 4, "eval_every": 4, "save_every": 2},
}


def assemble(workdir, *overrides: str) -> from_config.Assembly:
    return from_config.assemble(gpipe.load(CONFIG, overrides), workdir)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return the folder of a run, and its parameters."""
    assembly = assemble(tmp_path_factory.mktemp("runs") / "first")
    run.train(assembly, lambda record: None)
    trainer = assembly.trainer
    return assembly.workdir, trainer.pipe.to_layers(trainer.load(assembly.workdir).state)


def test_a_run_starts_with_the_parameters_of_another(first, tmp_path, capsys):
    """Resume without the first run's folder; the result is that of an uninterrupted run."""
    source = tmp_path / "source"
    shutil.copytree(first[0], source)
    assembly = assemble(tmp_path / "whole", f"train.init_from={source}", "mesh.stages=3")
    state = assembly.first_state()
    jax.tree.map(
        np.testing.assert_array_equal, assembly.trainer.pipe.to_layers(state.state), first[1]
    )
    assert state.step == 0
    assert f"train.init_from {source}: 6 of 6 arrays taken" in capsys.readouterr().err
    run.train(assembly, lambda record: None)

    def stop(record: dict) -> None:
        if record["step"] == 3:
            raise StoppedError("stopped")

    parts = assemble(tmp_path / "parts", f"train.init_from={source}", "mesh.stages=3")
    with pytest.raises(StoppedError):
        run.train(parts, stop)
    shutil.rmtree(source)
    run.train(parts, lambda record: None)
    trainer = assembly.trainer
    whole, resumed = (trainer.load(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(
        np.testing.assert_array_equal, trainer.to_layers(resumed), trainer.to_layers(whole)
    )
    assert np.any(
        trainer.pipe.to_layers(whole.state)[0]["linear"]["kernel"]
        != first[1][0]["linear"]["kernel"]
    )


def test_the_source_is_part_of_the_run(first):
    with pytest.raises(ConfigError, match=r"train.init_from: nothing before, 'elsewhere' now"):
        run.train(assemble(first[0], "train.init_from=elsewhere"), print)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such", r"train: `init_from` no/such does not exist; give the folder of a run"),
        ("{first}", r"train: nothing of `init_from` matches .*kernel \(12, 12\) there, \(7, 10\)"),
    ],
)
def test_a_source_that_cannot_be_used(first, tmp_path, source, message):
    source = source.format(first=first[0])
    with pytest.raises(SectionError, match=message) as error:
        run.train(
            assemble(tmp_path / "new", f"train.init_from={source}", "model.features=[64, 7, 10]"),
            print,
        )
    assert (error.value.section, error.value.field) == ("train", "init_from")
