"""Check the metrics that a config names: their names, their values, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.cli.main import main
from gpipe_jax.errors import ConfigError, SectionError
from gpipe_jax.losses.further_metrics import with_metrics
from gpipe_jax.training import from_config

CONFIG = """\
model: {kind: mlp, features: [64, 8, 10]}
data: {kind: digits, batch_size: 16}
train:
  steps: 1
  metrics: METRICS
pipeline: {micro_batches: 2}
"""
CODE = """
def largest(outputs, labels, scale=1.0): return scale * abs(outputs).max(-1)
def mean(outputs, labels): return outputs.mean()
def pair(outputs, labels): return outputs, labels
def fails(outputs, labels): return outputs["logits"]
def loss(outputs, labels): return largest(outputs, labels)
def make(): return largest
"""
TWICE = "{function: ex.py:largest, arguments: {scale: 2}NAME}, {function: ex.py:largest}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "ex.py").write_text(CODE)
    return tmp_path / "own.yaml"


def test_two_metrics_of_one_function_have_names(file: Path) -> None:
    file.write_text(CONFIG.replace("METRICS", f"[{TWICE.replace('NAME', ', name: twice')}]"))
    config = gpipe.load(file)
    assert gpipe.load({name: dict(section) for name, section in config}) == config
    trainer = from_config.assemble(config, file.parent / "run").trainer
    batch = next(from_config.dataset(config).train(0))
    means = trainer.evaluate(trainer.init(0).state, [batch])
    assert np.isclose(means["test_twice"], 2 * means["test_largest"], rtol=1e-6)


def test_two_metrics_of_one_name_are_refused_at_their_line(file: Path) -> None:
    file.write_text(CONFIG.replace("METRICS", f"[{TWICE.replace('NAME', '')}]"))
    message = r"own.yaml:5: train.metrics: 2 metrics are called 'largest'.*name: \.\.\.\}"
    with pytest.raises(ConfigError, match=message):
        gpipe.load(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"has 'mean', which must return .* an array \[8, ...\]; got float32"),
        ("pair", r"has 'pair', which must return .* got a tuple; do not average"),
        ("fails", r"has 'fails', which does not take outputs float32\[8,10\] with labels int32"),
        ("loss", r"has 'loss', a name that every record uses itself; give this metric another"),
    ],
)
def test_a_wrong_metric_is_reported_at_its_setting(file: Path, name: str, message: str) -> None:
    file.write_text(CONFIG.replace("METRICS", f"['ex.py:{name}']"))
    with pytest.raises(SectionError, match=message) as caught:
        from_config.assemble(gpipe.load(file), file.parent / "run")
    assert (caught.value.section, caught.value.field) == ("train", "metrics")


def test_the_plan_reports_it_there_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(CONFIG.replace("METRICS", "['ex.py:mean']"))
    assert main(["plan", str(file)]) == 2
    assert "own.yaml:5: train: `metrics` has 'mean'" in capsys.readouterr().err


def test_a_python_number_counts_for_each_example() -> None:
    loss = with_metrics(gpipe.losses.squared_error, {"one": lambda outputs, labels: 1})
    assert loss(np.ones(2), np.ones(2))[1]["one"] == 1
