"""Images and labels of a user's file are checked once, with the position of what is wrong."""

import re

import numpy as np
import pytest

import nas
from nas.training import datasets, file_checks


def arrays(count: int = 60) -> dict[str, np.ndarray]:
    inputs = np.linspace(-1, 1, count * 36).reshape(count, 6, 6, 1).astype(np.float32)
    return {"inputs": inputs, "labels": np.arange(count) % 3}


def changed(key: str, place, value, dtype=None) -> dict[str, np.ndarray]:
    """Return arrays of which one value is another one."""
    mine = arrays()
    mine[key] = mine[key].astype(dtype or mine[key].dtype)
    mine[key][place] = value
    return mine


def with_labels(labels) -> dict[str, np.ndarray]:
    return {**arrays(), "labels": np.asarray(labels)}


def evaluator(folder, mine) -> nas.TrainingEvaluator:
    np.savez(folder / "mine.npz", **mine)
    return nas.TrainingEvaluator(data=str(folder / "mine.npz"), batch_size=8)


FAULTS = {
    "nan": (
        changed("inputs", (17, 3, 4, 0), np.nan),
        "inputs[17, 3, 4, 0] is nan, which is not finite in float32 (1 of 2160 values)",
    ),
    "infinite in float32": (
        changed("inputs", (slice(8, 10), 0, 0, 0), 1e39, np.float64),
        "inputs[8, 0, 0, 0] is 1e+39, which is not finite in float32 (2 of 2160",
    ),
    "gap": (
        with_labels(np.arange(60) % 10 + 100),
        "labels have 10 different values, from 100 to 109, which would make 110 classes, but no "
        "image has label 0; number the classes from 0 on: labels = np.unique(labels, return_inv",
    ),
    "gap within": (with_labels([0, 1, 3] * 20), "make 4 classes, but no image has label 2; numb"),
    "negative": (changed("labels", 12, -1), "labels[12] is -1 (1 of 60 are negative); number the"),
    "one class": (with_labels([0] * 60), "all labels are 0: expected at least two classes; add"),
    "scores": (with_labels(np.eye(3)[np.arange(60) % 3]), "labels have the shape [60, 3]: expected "
               "a class for each image, [60]; of scores for each class take labels.argmax(-1)"),
    "floats": (with_labels([0.0, 1.0] * 30), "labels have the type float64: expected whole numb"),
    "not square": (
        {**arrays(), "inputs": arrays()["inputs"].reshape(60, 4, 9, 1)},
        "inputs have the shape [60, 4, 9, 1]: candidates are trained on square images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_position(tmp_path, fault) -> None:
    mine, problem = FAULTS[fault]
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        evaluator(tmp_path, mine).load_data()
    assert str(caught.value).startswith(f"data {tmp_path / 'mine.npz'}: ")


def test_a_search_refuses_such_data_before_it_writes_anything(tmp_path) -> None:
    broken = evaluator(tmp_path, FAULTS["nan"][0])
    with pytest.raises(ValueError, match=r"inputs\[17, 3, 4, 0\] is nan"):
        nas.search(space=nas.NASNetSpace(), evaluate=broken, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_fault_far_into_a_folder_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_checks, "CHUNK", 16)
    mine = changed("inputs", (50, 0, 0, 0), -np.inf)
    for key, array in mine.items():
        np.save(tmp_path / f"{key}.npy", array)
    with pytest.raises(ValueError, match=r"inputs\[50, 0, 0, 0\] is -inf"):
        file_checks.check(str(tmp_path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_legal_data_pass_and_are_checked_once(tmp_path, monkeypatch, dtype) -> None:
    def counted(name: str) -> None:
        checked.append(name)
        check(name)

    checked: list[str] = []
    check = file_checks.check
    monkeypatch.setattr(datasets.file_checks, "check", counted)
    mine = arrays()
    mine["inputs"] = (100 * np.abs(mine["inputs"])).astype(dtype)
    first = evaluator(tmp_path, mine)
    for _ in range(3):
        assert first.load_data().classes == 3
    assert len(checked) == 1


def test_a_class_that_only_the_test_images_have_is_no_gap(tmp_path) -> None:
    """Let the split for `gpipe train` hold the only image of a class."""
    order = np.random.default_rng(0).permutation(60)
    labels = np.where(np.arange(60) == order[0], 1, np.arange(60) % 2 * 2)
    assert evaluator(tmp_path, with_labels(labels)).load_data().classes == 3
