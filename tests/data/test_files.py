"""Check data sets from the user's own files, and the messages for unusable files."""

import itertools
import json
import pickle
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import own_files
import pytest

from gpipe_jax import own_code
from gpipe_jax.cli import main as cli
from gpipe_jax.data import DataError, Rules, array_record, arrays, iterable
from gpipe_jax.data.stream import Dataset

OWN = own_files.example_arrays()


def all_examples(dataset: Dataset, batch_size: int, count: int) -> dict[str, np.ndarray]:
    """Return an epoch of training and all held-out examples, sorted by their first number."""
    batches = [*itertools.islice(dataset.train(0), count // batch_size), *dataset.test()]
    whole = {key: np.concatenate([b[key] for b in batches]) for key in ("inputs", "labels")}
    order = np.argsort(whole["inputs"].reshape(len(whole["inputs"]), -1)[:, 0], kind="stable")
    return {key: a[order] for key, a in whole.items()}


@pytest.mark.parametrize("kind", ["npz", "npy", "records"])
def test_every_example_is_in_one_split(tmp_path: Path, kind: str) -> None:
    source = getattr(own_files, kind)(tmp_path)
    make = array_record if kind == "records" else arrays
    data = make(source, 15, 0, test_fraction=0.2)
    assert (data.train_examples, data.test_examples) == (120, 30)
    stored = all_examples(data, 15, 120)
    np.testing.assert_array_equal(stored["inputs"], OWN["inputs"])
    np.testing.assert_array_equal(stored["labels"], OWN["labels"])
    assert (stored["inputs"].dtype, stored["labels"].dtype) == (np.float32, np.int32)
    other = make(source, 15, 1, test_fraction=0.2)  # the seed does not draw the split
    for a, b in zip(data.test(), other.test(), strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])


def test_separate_test_files(tmp_path: Path) -> None:
    train, test = own_files.npy(tmp_path), own_files.npz(tmp_path, **own_files.example_arrays(7))
    data = arrays(train, 50, 0, test=test)
    assert (data.train_examples, data.test_examples) == (150, 7)
    np.testing.assert_array_equal(next(data.test())["inputs"], OWN["inputs"][:7])


def test_arrays_in_a_folder_are_mapped(tmp_path: Path) -> None:
    """Read what is written into the file after the data set was made."""
    folder = own_files.npy(tmp_path)
    data = arrays(folder, 150, 0, test=folder)
    np.lib.format.open_memmap(folder / "inputs.npy", mode="r+")[:] = -1
    assert (next(data.test())["inputs"] == -1).all()


@pytest.mark.parametrize(
    ("dtype", "rules", "expected"),
    [
        (np.uint8, Rules(), [-1.0, 1.0]),
        (np.float16, Rules(), [0, 255]),
        (np.uint8, Rules(tokens=True), [0, 255]),
        (np.int64, Rules(tokens=True, classes=256), [0, 255]),
    ],
)
def test_types(tmp_path: Path, dtype: Any, rules: Rules, expected: list) -> None:
    inputs = np.array([[0, 255]] * 4).astype(dtype)
    path = own_files.npz(tmp_path, inputs=inputs, labels=np.zeros(4, np.uint8))
    batch = next(arrays(path, 2, 0, test=path, rules=rules).train(0))
    np.testing.assert_array_equal(batch["inputs"], [expected] * 2)
    assert batch["inputs"].dtype == (np.int32 if rules.tokens else np.float32)


def broken(folder: Path, kind: str) -> str:
    """Write a file that cannot be used."""
    path, a = folder / "own.npz", np.zeros((4, 2))
    if kind == "no file":
        path = folder / "gone.npz"
    elif kind == "text":
        path.write_text("inputs")
    elif kind == "cut":
        own_files.npz(folder)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "keys":
        own_files.npz(folder, x=a, y=a)
    elif kind == "lengths":
        own_files.npz(folder, inputs=a, labels=np.zeros(5, int))
    elif kind == "no axis":
        own_files.npz(folder, inputs=a, labels=np.zeros((), int))
    elif kind == "objects":
        own_files.npz(folder, inputs=a.astype(object), labels=np.zeros(4, int))
    elif kind == "npy":
        path = own_files.npy(folder) / "inputs.npy"
    elif kind == "half a folder":
        path = own_files.npy(folder)
        (path / "labels.npy").unlink()
    elif kind == "empty":
        own_files.npz(folder, inputs=a[:0], labels=np.zeros(0, int))
    elif kind == "one":
        own_files.npz(folder, inputs=a[:1], labels=np.zeros(1, int))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "no file",
            r"`train` .*gone.npz cannot be read: No such file or directory .*; give a .npz",
        ),
        ("text", r"`train` .*own.npz cannot be read: .*; give a .npz file or a folder"),
        ("cut", r"`train` .*own.npz cannot be read: .*zip.*; give a .npz file or a folder"),
        ("keys", r"it has no inputs and no labels, but x, y"),
        ("lengths", r"equally many: inputs \[4, 2\], labels \[5\]"),
        ("no axis", r"equally many: inputs \[4, 2\], labels \[\]"),
        ("objects", r"cannot be read: Object arrays cannot be loaded"),
        ("npy", r"it is not a .npz file; for .npy files give their folder"),
        ("half a folder", r"No such file or directory \(.*labels.npy\)"),
        ("empty", r"`train` .* has no examples"),
        ("one", r"`test_fraction` 0.1 of the 1 examples of .* is 0: neither split may be empty"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrays(broken(tmp_path, kind), 2, 0)


@pytest.mark.parametrize(
    ("inputs", "labels", "rules", "message"),
    [
        (np.zeros((9, 2), np.int64), np.zeros(9, int), Rules(), "inputs .* type int64; use floats"),
        (np.zeros((9, 2), bool), np.zeros(9, int), Rules(), "inputs of .* have type bool"),
        (np.zeros((9, 2)), np.zeros(9), Rules(), "labels of .* type float64; they must be int"),
        (np.zeros((9, 2)), np.zeros(9, int), Rules(True), "inputs .* float64; tokens are integers"),
        (
            np.zeros((9, 2)),
            np.full(9, 3),
            Rules(classes=3),
            "3 to 3; the model accepts 0 to 2",
        ),
        (
            np.zeros((9, 2)),
            np.full(9, -1),
            Rules(),
            "from -1 to -1; the model accepts 0 to 2147483647",
        ),
        (np.full((9, 2), 5), np.zeros(9, int), Rules(True, 5), "inputs of .* from 5 to 5; the mod"),
    ],
)
def test_arrays_of_wrong_types_and_ranges(tmp_path, inputs, labels, rules, message) -> None:
    path = own_files.npz(tmp_path, inputs=inputs, labels=labels)
    data = arrays(path, 2, 0, rules=rules)
    with pytest.raises(DataError, match=message):
        next(data.train(0))
    with pytest.raises(DataError, match=message):
        list(data.test())


def test_array_record_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`train` .*gone: no such file; give a path"):
        array_record(str(tmp_path / "gone"), 2, 0)
    (tmp_path / "text.array_record").write_text("no records" * 100)
    with pytest.raises(ValueError, match=r"`train` .*text.array_record is not array_record: "):
        array_record(str(tmp_path / "text.array_record"), 2, 0)
    source = own_files.records(tmp_path)
    with pytest.raises(
        DataError, match=r"record \d+ of .*_record is not an example \(KeyError: 'labels'\)"
    ):
        next(array_record(source, 2, 0, decode=lambda record: {"inputs": 1}).train(0))
    (tmp_path / "objects").mkdir()
    objects = np.empty(2, object)
    objects[:] = [np.zeros(2), None]
    damaged = own_files.records(tmp_path / "objects", inputs=objects, labels=np.zeros(2, int))
    with pytest.raises(DataError, match=r"record \d of .* is not an example \(ValueError: Object"):
        list(array_record(damaged, 1, 0, test=damaged).test())
    sizes = iter(range(1, 1000))

    def decode(_: bytes) -> dict:
        return {"inputs": np.zeros(next(sizes)), "labels": 1}

    with pytest.raises(DataError, match="differ in their shapes"):
        next(array_record(source, 2, 0, decode=decode).train(0))


def test_anything_that_iterates() -> None:
    batches = [{"inputs": np.arange(4) + i, "labels": np.arange(4)} for i in range(9)]
    data = iterable("mine", lambda step: iter(batches[step:]), lambda: batches[:1])
    assert [b["inputs"][0] for b in itertools.islice(data.train(3), 6)] == [3, 4, 5, 6, 7, 8]
    some = itertools.islice(data.train(7, np.array([2, 0])), 2)
    assert [b["inputs"].tolist() for b in some] == [[9, 7], [10, 8]]
    assert list(data.test()) == batches[:1]


EXAMPLE = {"inputs": np.zeros((4, 3)), "labels": np.zeros(4, int)}
SHORT = {"inputs": np.zeros((2, 3)), "labels": np.zeros(2, int)}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"the training batches of mine from step 0 on ended; .*begin the next epoch"),
        ([EXAMPLE], "step 0 on ended"),
        ([{"inputs": np.zeros(4)}], r"is \['inputs'\]; give a dict of inputs and labels"),
        ([np.zeros(4)], "is ndarray; give a dict"),
        ([{**EXAMPLE, "labels": np.zeros(3)}], "the first axis of all must be the example"),
        ([{"inputs": 1.0, "labels": 2.0}], "the first axis of all must be the example"),
        ([EXAMPLE, SHORT], r"has shapes .*\(2, 3\).*, not .*\(4, 3\).*all batches must have"),
    ],
)
def test_bad_batches_of_an_iterable(batches, message):
    data = iterable("mine", lambda step: batches, lambda: [EXAMPLE, SHORT])
    with pytest.raises(DataError, match=message):
        list(data.train(0))
    assert len(list(data.test())) == 2, "the last may be smaller"


def test_held_out_examples_of_an_iterable_differ():
    other = {"inputs": np.zeros((4, 5)), "labels": np.zeros(4, int)}
    data = iterable("mine", lambda step: [], lambda: [EXAMPLE, other])
    with pytest.raises(DataError, match="all examples must have"):
        list(data.test())


# --- from a config --------------------------------------------------------------------------------

CONFIG = """\
model:
  kind: mlp
  features: [3, 8, 10]
data:
  kind: arrays
  train: own.npz
  batch_size: 30
optimizer:
  kind: sgd
train:
  steps: 3
  eval_every: 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(CONFIG)
    own_files.npz(tmp_path, inputs=OWN["inputs"] / 450, labels=OWN["labels"])
    return tmp_path


def train(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert cli.main(["train", "x.yaml", "--json", *overrides]) == code, capsys.readouterr().err
    said = capsys.readouterr()
    return said.err if code else json.loads(said.out.splitlines()[-1])


def test_runs_from_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(capsys)
    own_files.records(folder, inputs=OWN["inputs"] / 450, labels=OWN["labels"])
    section = "data={kind: array_record, train: 'own-*.array_record', batch_size: 30}"
    again = train(capsys, section, "train.workdir=other")
    assert again["test_loss"] == first["test_loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=gone.npz"], r"override 'data.train=gone.npz': data: `train` gone.npz cannot"),
        (["data.batch_size=136"], r"data.batch_size=136': data: `batch_size` 136 is above the 135"),
        (
            ["model.features=[3, 9]"],
            r"x.yaml:4: data: labels of own.npz are .* accepts 0 to 8",
        ),
        (["data.test=x.yaml"], r"override 'data.test=x.yaml': data: `test` x.yaml cannot be read"),
        (["data={kind: arrays}"], r"data.train: required; give a .npz file with arrays inputs"),
        (["data={kind: python}"], r"data.source: required; give the file and the function"),
    ],
)
def test_wrong_files_are_named(folder: Path, capsys, overrides: list[str], message: str) -> None:
    error = train(capsys, *overrides, code=2)
    assert re.search(message, error), error


def test_a_wrong_label_later_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.where(np.arange(150) == 77, 10, OWN["labels"])
    own_files.npz(folder, inputs=OWN["inputs"], labels=labels)
    error = train(capsys, "data.batch_size=1", "train.steps=150", code=2)
    assert "x.yaml:4: data: labels of own.npz are from 10 to 10; the model accepts 0 to 9" in error


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            None,
            "my_data.py:make is not a function of a Python file; give one as my_file.py:function",
        ),
        ("make = lambda **_: 3", "returned a int; it must return a gpipe_jax.data.Dataset"),
        (
            "def make(**_): return 1 / 0",
            "my_data.py:make raised ZeroDivisionError: division by zero",
        ),
        ("def mak(): ...", "does not define 'make'; did you mean 'mak'?"),
        ("def make(", "raised SyntaxError: "),
    ],
)
def test_python_files_that_make_no_data(folder: Path, capsys, code: str | None, message) -> None:
    if code is not None:
        (folder / "my_data.py").write_text(code)
    error = train(capsys, "data={kind: python, source: 'my_data.py:make'}", code=2)
    assert message in error


def test_a_file_with_the_name_of_a_module_does_not_replace_it(folder: Path, capsys) -> None:
    (folder / "random.py").write_text("def make(**_): return 3")
    message = "random.py:make returned a int"
    assert message in train(capsys, "data={kind: python, source: 'random.py:make'}", code=2)
    assert sys.modules["random"] is random


def test_functions_of_the_file_can_be_sent_to_other_processes(folder: Path, monkeypatch) -> None:
    """Pickle and unpickle as multiprocessing does."""
    code = "import pickle\ndef read(): return 7\ndef make(**_): return pickle.dumps(read)"
    functions = []
    for path in (folder / "my-own.data.py", folder / "other" / "my-own.data.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        functions.append(pickle.loads(own_code.call(f"{path}:make", {})))
    assert [read() for read in functions] == [7, 7]
    assert functions[0] is not functions[1]
    monkeypatch.chdir(folder / "other")
    again = pickle.loads(own_code.call("my-own.data.py:make", {}))
    assert again.__module__ == functions[1].__module__


FINITE = """
import numpy as np
from gpipe_jax import data

def make(batch_size, seed):
    batch = {"inputs": np.zeros((batch_size, 4), np.float32), "labels": np.zeros(batch_size, int)}
    return data.iterable("mine", lambda step: [batch] * COUNT, lambda: [batch])
"""


@pytest.mark.parametrize("count", [0, 3])
def test_data_of_ones_own_that_ends_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FINITE.replace("COUNT", str(count)))
    (tmp_path / "c.yaml").write_text(
        "model: {kind: mlp, features: [4, 2]}\n"
        "data: {kind: python, source: mine.py:make, batch_size: 4}\n"
        "train: {steps: 5}\n"
    )
    assert cli.main(["train", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert "c.yaml:2: " in error and "the training batches of mine" in error


OWN_BATCHES = """
import numpy as np
from gpipe_jax import data

def batch(count=4, label=1, kind=np.int32, weight=1):
    inputs = np.linspace(-1, 1, 4 * count, dtype=np.float32).reshape(count, 4)
    labels, weights = np.full(count, label, kind), np.full(count, weight, np.float32)
    return {"inputs": inputs, "labels": labels, "weights": weights}

def train(step):
    while True:
        yield FIRST if step < 3 else LATER
        step += 1

def make(batch_size, seed):
    return data.iterable("mine", train, lambda: TEST)
"""
OWN_CONFIG = """
model: {kind: mlp, features: [4, 2]}
data: {kind: python, source: mine.py:make, batch_size: 4}
optimizer: {kind: sgd}
train: {steps: 5, eval_every: 5, save_every: 2}
"""


def train_own(
    folder: Path, capsys, first="batch()", later="batch()", test="[batch()]", code: int = 2
) -> str:
    """Return the message for data that ends the training."""
    source = OWN_BATCHES.replace("FIRST", first).replace("LATER", later).replace("TEST", test)
    (folder / "mine.py").write_text(source)
    (folder / "own.yaml").write_text(OWN_CONFIG)
    assert cli.main(["train", "own.yaml"]) == code
    error = capsys.readouterr().err
    assert code == 1 or "own.yaml:3: " in error
    return error


def saved_steps(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs/own/checkpoints").glob("[0-9]*")}


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("[batch(5)]", r"has shape \[5, 4\], the pipeline's example had \[4, 4\]"),
        ("[batch(kind=np.float64)]", r"has type float64, but the pipeline takes int32; conv"),
        ("[batch(weight=0)]", r"weights of a batch must sum to more than 0, got 0.0"),
        (
            "[batch(label=-1)]",
            r"held-out batch of mine are from -1 to -1; the model accepts 0",
        ),
        (
            "[batch(label=2)]",
            r"held-out batch of mine are from 2 to 2; the model accepts 0 to",
        ),
        ("[]", "the held-out data of mine has no examples; give some"),
    ],
)
def test_held_out_data_is_tried_before_training(folder: Path, capsys, test: str, message) -> None:
    assert re.search(message, train_own(folder, capsys, test=test))
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_of_ones_own_are_checked_at_the_start(folder: Path, capsys, label: int) -> None:
    error = train_own(folder, capsys, first=f"batch(label={label})")
    assert f"labels of the first training batch of mine are from {label} to {label}; the" in error


def test_a_later_batch_without_weight_is_bad_input(folder: Path, capsys) -> None:
    error = train_own(folder, capsys, later="batch(weight=0)")
    assert "the weights of a batch must sum to more than 0, got 0.0" in error
    assert saved_steps(folder) == {"2", "3"}


def test_a_later_label_that_is_no_class_is_said(folder: Path, capsys) -> None:
    error = train_own(folder, capsys, later="batch(label=-1)")
    message = "labels of the training batch of step 4 of mine are from -1 to -1; the model accepts"
    assert message in error
    assert "step 3 is saved before the run ends; the same command resumes from it" in error
    assert "3" in saved_steps(folder)


def test_a_bad_evaluation_loses_no_step(folder: Path, capsys) -> None:
    error = train_own(folder, capsys, test="[batch(), batch(weight=0)]")
    assert "the weights of a batch must sum to more than 0, got 0.0" in error
    assert saved_steps(folder) == {"4", "5"}
