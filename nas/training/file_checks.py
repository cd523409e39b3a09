"""Check the images and labels of a user's file once, before candidates are trained on them.

A NaN would make every candidate fail, and a label that is not a class would make networks with too
many outputs, both without a warning. Messages have the position in the file.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpipe_jax.data.rules import KEYS
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths

CHUNK = 1024  # images that are checked at once: files may be larger than memory
FLOAT32 = np.finfo(np.float32).max


def check(name: str) -> None:
    """Check the images and labels of a .npz file, or of a folder, that can be read.

    Raises:
        ArgumentError: Images are not finite or not square, or labels are not the numbers of
            classes, from 0 without gaps.
    """
    inputs, labels = _stored(paths.local("data", name))
    _check_labels(labels, len(inputs), _problem_of(name))
    _check_images(inputs, _problem_of(name))


Problem = Callable[[str], ArgumentError]
"""Make the error from a text."""


def _problem_of(name: str) -> Problem:
    def problem(text: str) -> ArgumentError:
        return ArgumentError("data", f"data {name}: {text}")

    return problem


def _stored(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels as they are stored; those of a folder stay on disk."""
    if path.is_dir():
        inputs, labels = (np.load(path / f"{key}.npy", mmap_mode="r") for key in KEYS)
        return inputs, labels
    with np.load(path, allow_pickle=False) as file:
        return file["inputs"], file["labels"]


def _check_labels(labels: np.ndarray, count: int, problem: Problem) -> None:
    if labels.shape != (count,):
        raise problem(
            f"labels have the shape {list(labels.shape)}: expected a class for each image, "
            f"[{count}]; of scores for each class take labels.argmax(-1)"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise problem(
            f"labels have the type {labels.dtype}: expected whole numbers, the classes from 0 on; "
            "give labels.astype('int32')"
        )
    remedy = "number the classes from 0 on: labels = np.unique(labels, return_inverse=True)[1]"
    negative = np.flatnonzero(labels < 0)
    if negative.size:
        first = int(negative[0])
        raise problem(
            f"labels[{first}] is {labels[first]} ({negative.size} of {count} are negative); "
            f"{remedy}"
        )
    used = np.unique(labels)
    classes = int(used[-1]) + 1
    if len(used) < 2:
        raise problem(f"all labels are {used[0]}: expected at least two classes; add images")
    if len(used) < classes:
        first = int(np.flatnonzero(used != np.arange(len(used)))[0])
        raise problem(
            f"labels have {len(used)} different values, from {used[0]} to {used[-1]}, which would "
            f"make {classes} classes, but no image has label {first}; {remedy}"
        )


def _check_images(inputs: np.ndarray, problem: Problem) -> None:
    if inputs.ndim != 4 or inputs.shape[1] != inputs.shape[2]:
        raise problem(
            f"inputs have the shape {list(inputs.shape)}: candidates are trained on square images; "
            "use inputs [N, pixels, pixels, channels]"
        )
    if not np.issubdtype(inputs.dtype, np.floating):
        return  # pixels, or a type that training refuses
    count, first = 0, None
    for start, wrong in _not_finite(inputs):
        count += len(wrong)
        first = first or (start + int(wrong[0][0]), *map(int, wrong[0][1:]))
    if first is not None:
        place = ", ".join(map(str, first))
        raise problem(
            f"inputs[{place}] is {inputs[first]}, which is not finite in float32 "
            f"({count} of {inputs.size} values); remove or replace them, for example by "
            "np.nan_to_num"
        )


def _not_finite(inputs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield chunks with such values: the first image, and the places in the chunk."""
    for start in range(0, len(inputs), CHUNK):
        with np.errstate(invalid="ignore"):
            wrong = np.argwhere(~(np.abs(inputs[start : start + CHUNK]) <= FLOAT32))
        if len(wrong):
            yield start, wrong
