"""Check the docstrings of public names: every argument is described, and the examples run."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from docstrings import examples, public_objects, undocumented
from paths import REPOSITORY

import gpipe_jax
import nas
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.zoo.resnet import BottleneckEnd, BottleneckStart
from gpipe_jax.zoo.transformer.layers import Embedding, TiedHead
from gpipe_jax.zoo.unet import Down, Up

DESCRIBED = {
    f"{package.__name__}.{name}": value
    for package in (gpipe_jax, nas)
    for name, value in public_objects(package).items()
}
EXAMPLES = {
    f"{package.__name__}.{name}": code
    for package in (gpipe_jax, nas)
    for name, code in examples(package).items()
}
NOT_RUN = {
    "gpipe_jax.data.array_record": "reads files of the reader's",
    "gpipe_jax.data.cifar10": "reads the published files",
    "gpipe_jax.data.python": "reads a file of the reader's",
    "gpipe_jax.data.text": "reads files of the reader's",
    "gpipe_jax.plan": "compiles for a TPU",
    "nas.NASBench201Space": "reads the table's file",
    "nas.NASBench201Table": "reads the table's file",
    "nas.NetworkCosts": "compiles for a TPU",
    "nas.Result": "trains 2000 candidates",
    "nas.Result.copy_to": "copies a run of the reader's",
    "nas.Result.resume": "trains 2000 candidates",
    "nas.TrainingEvaluator": "trains 1000 candidates",
    "nas.search": "evaluates 1000 candidates",
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_arguments_and_results_are_described(name: str) -> None:
    assert not undocumented(DESCRIBED[name])


def test_a_planted_omission_is_seen() -> None:
    def described(a: int, *rest: int) -> int:
        """Add.

        Args:
            a: A number.
            *rest: More numbers.

        Returns:
            The sum.
        """
        return a + sum(rest)

    def forgetful(a: int, b: int) -> int:
        """Add `a` and b.

        Args:
            a: A number.
        """
        return a + b

    assert not undocumented(described)
    assert undocumented(forgetful) == ["b", "Returns"]


# --- examples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Return what the examples take for granted."""
    gpipe = gpipe_jax
    batch = next(gpipe.data.digits(batch_size=8, seed=0).train(0))
    batch["weights"] = np.ones(8, np.float32)
    layers = gpipe.zoo.mlp((64, 8, 10))
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example=batch,
        micro_batches=2,
    )
    params, stats = gpipe.sequential.init(layers, batch["inputs"])
    return dict(
        gpipe=gpipe,
        nas=nas,
        itertools=itertools,
        jax=jax,
        optax=optax,
        losses=gpipe.losses,
        sequential=gpipe.sequential,
        weight_decay=gpipe.optimizers.weight_decay,
        step_key=step_key,
        Path=Path,
        config=gpipe.load({"model": {"kind": "mlp"}, "data": {"kind": "digits"}}),
        layers=layers,
        pipe=pipe,
        trainer=gpipe.Trainer(pipe, optax.sgd(0.1)),
        batch=batch,
        params=params,
        stats=stats,
        x=batch["inputs"],
        images=batch["inputs"],
        gather_test=lambda index: batch,
        load_inputs=lambda step: batch["inputs"],
        load_labels=lambda step: batch["labels"],
        Down=Down,
        Up=Up,
        BottleneckStart=BottleneckStart,
        BottleneckEnd=BottleneckEnd,
        Embedding=Embedding,
        TiedHead=TiedHead,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder of an example, with the files that it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    return tmp_path


def test_every_example_that_does_not_run_exists() -> None:
    assert set(NOT_RUN) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, names: dict[str, Any], folder: Path) -> None:
    code = compile(EXAMPLES[name], name, "exec")
    if name == "gpipe_jax.data.arrays":
        np.savez("digits.npz", inputs=np.zeros((80, 3), np.float32), labels=np.zeros(80, int))
    if name == "nas.load":
        nas.search(
            space=nas.NASNetSpace(),
            evaluate=lambda architecture: 0.5,
            population=4,
            sample=2,
            cycles=6,
            name="first",
        )
    if name not in NOT_RUN:
        exec(code, dict(names))
