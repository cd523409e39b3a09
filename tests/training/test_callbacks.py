"""Check the callbacks of a config: errors name the code, and early stopping survives a resume."""

import json

import pytest

import gpipe_jax as gpipe
from gpipe_jax.cli.main import main
from gpipe_jax.errors import StoppedError
from gpipe_jax.training import from_config, run

CONFIG = """
model: {kind: mlp, features: [64, 12, 10]}
data: {kind: digits, batch_size: 24}
train:
  steps: 12
  eval_every: 2
  callbacks: [CALLBACKS]
"""

# Nothing is good enough: the first evaluation, of step 2, stays the best.
EARLY = "{function: 'gpipe_jax:EarlyStopping', arguments: {patience: 3, min_delta: 100}}"

CODE = """
def look(record):
    if "test_loss" in record:
        return deeper(record)


def deeper(record):
    return record["test_acuracy"]
"""


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a config with these callbacks."""

    def write(callbacks: str) -> str:
        (tmp_path / "mine.py").write_text(CODE)
        path = tmp_path / "x.yaml"
        path.write_text(CONFIG.replace("CALLBACKS", callbacks))
        return str(path)

    return write


def test_the_error_of_a_callback_names_its_line_and_loses_no_step(config, tmp_path, capsys):
    path = config("'mine.py:look'")
    code = main(["train", path, f"train.workdir={tmp_path / 'run'}"])
    printed = capsys.readouterr().err
    assert code == 2 and "Traceback" not in printed
    assert f"{path}:7: train: mine.py:look raised KeyError: 'test_acuracy', at " in printed
    assert f"{tmp_path / 'mine.py'}:8; correct it, and run the same command again" in printed
    assert "step 2 is saved before the run ends" in printed
    (tmp_path / "mine.py").write_text("def look(record):\n    return record['step'] == 4\n")
    assert main(["train", path, f"train.workdir={tmp_path / 'run'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4


def test_a_metric_that_does_not_exist_names_the_setting(config, tmp_path, capsys):
    path = config("{function: 'gpipe_jax:EarlyStopping', arguments: {metric: test_los}}")
    assert main(["train", path, f"train.workdir={tmp_path / 'run'}"]) == 2
    assert "`metric` 'test_los' is not in the record of an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "interrupted", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (None, 3))]
)
def test_early_stopping_ends_a_resumed_run_at_the_same_step(config, tmp_path, interrupted):
    loaded = gpipe.load(config(EARLY))
    work = tmp_path / "run"

    def stop(record: dict) -> None:
        if record["step"] == interrupted:
            raise StoppedError("stopped")

    if interrupted is not None:
        with pytest.raises(StoppedError):
            run.train(from_config.assemble(loaded, work), stop)
    summary = run.train(from_config.assemble(loaded, work), lambda record: None)
    assert summary.figures["steps"] == 8
    assert "a callback (train.callbacks) ended the run at step 8 of 12; to go on" in summary.note
