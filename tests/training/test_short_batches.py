"""Train a network with batch norm on a short last batch: it is padded, from Python and a config."""

import jax
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.training import from_config, run

CODE = """
import dataclasses

import numpy as np
from flax import nnx

import gpipe_jax as gpipe

INPUTS = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
LABELS = (INPUTS.sum(1) > 0).astype(np.int32)


class Block(nnx.Module):
    def __init__(self, out, *, rngs):
        self.linear = nnx.Linear(4, out, rngs=rngs)
        self.norm = nnx.BatchNorm(out, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.linear(x)))


def layers():
    return [gpipe.layer(Block, out=4), gpipe.layer(Block, out=2)]


def batch(step, count):
    rows = np.arange(step, step + count)
    return {"inputs": INPUTS[rows], "labels": LABELS[rows]}


def make(batch_size, seed):
    def get(index):
        return {"inputs": INPUTS[index], "labels": LABELS[index]}

    def train(start, rows=None):
        sizes = [batch_size] * 2 + [5]
        return (batch(step, sizes[step]) for step in range(start, 3))

    whole = gpipe.data.dataset("mine", batch_size, seed, (get, 56), (get, 8))
    return dataclasses.replace(whole, train=train)
"""

CONFIG = {
    "model": {"kind": "python", "function": "mine.py:layers"},
    "data": {"kind": "python", "source": "mine.py:make", "batch_size": 8},
    "loss": {"kind": "classification"},
    "mesh": {"stages": 2},
    "pipeline": {"micro_batches": 2},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"steps": 3, "eval_every": 3},
}


def padded(batch: dict) -> dict:
    """Return eight examples: the inputs once more, in their order and at weight 0."""
    rows = np.arange(8) % len(batch["labels"])
    weights = (np.arange(8) < len(batch["labels"])).astype(np.float32)
    return {**{name: a[rows] for name, a in batch.items()}, "weights": weights}


@pytest.fixture
def assembly(tmp_path) -> from_config.Assembly:
    (tmp_path / "mine.py").write_text(CODE)
    train = {**CONFIG["train"], "code": str(tmp_path)}
    config = gpipe.load({**CONFIG, "train": train})
    return from_config.assemble(config, tmp_path / "run")


def test_a_short_last_batch_is_trained(assembly):
    trainer, batches = assembly.trainer, list(assembly.dataset.train(0))
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 5]
    assert any(jax.tree.leaves(shape.stats) for shape in trainer.pipe.shapes), "batch norm"
    fitted = trainer.fit(trainer.init(0), batches)
    expected = trainer.init(0)
    for batch in map(padded, batches):
        expected, _ = trainer.step(expected, batch)
    run.train(assembly, lambda record: None)
    saved = trainer.load(assembly.workdir)
    for current in (fitted, saved):
        assert current.step == 3
        have, wanted = trainer.to_layers(current), trainer.to_layers(expected)
        jax.tree.map(np.testing.assert_array_equal, have.layers, wanted.layers)
