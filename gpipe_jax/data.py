"""Real data sets that need no network, as seeded streams that can start at any step.

Training is endless: the batch of step s depends on (seed, s) only, so a restored run continues
with `train(s)`, which looks nothing up before step s. Each epoch is its own seeded permutation and
epochs follow each other without a gap: a batch may hold the end of one and the start of the next,
all batches have the same size, and no example is left out. Letters: B batch_size, T length.
"""

import functools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Batch = dict[str, np.ndarray]  # "inputs" and "labels", the first axis is the example


@dataclass(frozen=True)
class Dataset:
    """A training stream and the held-out examples beside it."""

    name: str
    train: Callable[[int], Iterator[Batch]]  # batches from this step on, without end
    test: Callable[[], Iterator[Batch]]  # each held-out example once, in order; the last B' <= B
    train_examples: int
    test_examples: int


def digits(batch_size: int, seed: int, *, test_fraction: float = 0.2, shift: int = 0) -> Dataset:
    """Return scikit-learn's 1797 handwritten digits.

    inputs: float32 [B, 8, 8, 1] from -1 to 1, of mean -0.4; labels: int32 [B], 0 to 9. `seed` also
    draws the split, which keeps the classes in proportion. Every training image is moved by up to
    `shift` pixels each way.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: run pip install 'gpipe-jax[examples]'"
        ) from error
    _check_arguments("digits", batch_size, seed, test_fraction)
    images, targets = load_digits(return_X_y=True)
    inputs = (images / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
    labels = targets.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
    )
    parts = np.sort(train), np.sort(test)

    def gather(part: np.ndarray) -> Callable[[np.ndarray], Batch]:
        return lambda index_B: {"inputs": inputs[part[index_B]], "labels": labels[part[index_B]]}

    return _dataset(
        "digits",
        batch_size,
        seed,
        *((gather(part), len(part)) for part in parts),
        augment=functools.partial(_moved, shift) if shift else None,
    )


def _moved(shift: int, batch: Batch, rng: np.random.Generator) -> Batch:
    """Return the batch with each image moved at random, its edge filled with the background."""
    images = batch["inputs"]
    size = images.shape[1]
    pad = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = np.pad(images, pad, constant_values=images.min())
    corners = rng.integers(0, 2 * shift + 1, (len(images), 2))
    moved = [a[r : r + size, c : c + size] for a, (r, c) in zip(padded, corners, strict=True)]
    return {**batch, "inputs": np.stack(moved)}


def text(
    source: str | Path, batch_size: int, length: int, seed: int, *, test_fraction: float = 0.1
) -> Dataset:
    """Return next-byte prediction on a text.

    inputs: int32 [B, T] of bytes; labels: int32 [B, T], the byte after each. `source` is one of

    - "topics": the help texts of `pydoc_data.topics`, 0.5 MB, in the order of their keys;
    - "stdlib": the standard library's .py files, without tests and site-packages, 13 MB, in the
      order of their paths. Both differ between Python versions: compare losses on one only;
    - the path of a file.

    The last `test_fraction` of the bytes is held out, in one piece: windows overlap, so windows
    held out at random would have been read in training. It depends on neither seed nor length. It
    is cut into windows that predict each byte once, the very first from the last training byte;
    what is left of a window at the end is dropped. A training example starts at any byte.
    """
    _check_arguments(f"text {source}", batch_size, seed, test_fraction)
    data = np.frombuffer(_read(source), np.uint8)
    held_out = round(len(data) * test_fraction)
    split = len(data) - held_out
    longest = min(split - 1, held_out)
    if not 1 <= length <= longest:
        raise ValueError(
            f"length {length} does not fit text {source} of {len(data)} bytes, {split} for "
            f"training and {held_out} held out: use a length of 1 to {longest}"
            if longest
            else f"text {source} of {len(data)} bytes is too short: training needs 2 bytes and the "
            f"held-out fraction {test_fraction} 1; use a longer text"
        )

    def gather(starts_B: np.ndarray) -> Batch:
        windows = data[starts_B[:, None] + np.arange(length + 1)].astype(np.int32)
        return {"inputs": windows[:, :-1], "labels": windows[:, 1:]}

    return _dataset(
        f"text {source}",
        batch_size,
        seed,
        (gather, split - length),
        (lambda window_B: gather(split - 1 + window_B * length), held_out // length),
    )


def _dataset(
    name: str,
    batch_size: int,
    seed: int,
    train_part: tuple[Callable[[np.ndarray], Batch], int],
    test_part: tuple[Callable[[np.ndarray], Batch], int],
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None,
) -> Dataset:
    """Return the data set of two parts, each a function of example indices [B] and its size.

    `augment` changes training batches only.
    """
    (gather_train, train_examples), (gather_test, test_examples) = train_part, test_part
    if batch_size > train_examples:
        raise ValueError(
            f"batch_size {batch_size} is above the {train_examples} training examples of {name}: "
            f"use {train_examples} or fewer"
        )

    def train(start_step: int) -> Iterator[Batch]:
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: steps count from 0")
        return _train_batches(train_examples, batch_size, seed, start_step, gather_train, augment)

    def test() -> Iterator[Batch]:
        for start in range(0, test_examples, batch_size):
            yield gather_test(np.arange(start, min(start + batch_size, test_examples)))

    return Dataset(name, train, test, train_examples, test_examples)


def _train_batches(
    examples: int,
    batch_size: int,
    seed: int,
    start_step: int,
    gather: Callable[[np.ndarray], Batch],
    augment: Callable[[Batch, np.random.Generator], Batch] | None,
) -> Iterator[Batch]:
    import grain  # takes 1.5 s

    # Indices are batched before the lookup: one numpy gather per batch, not one per example.
    steps = (
        grain.MapDataset.range(examples)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size, drop_remainder=True)
        .map(gather)
    )
    if augment is not None:
        steps = steps.random_map(augment)  # its generator is a function of (seed, step)
    steps = steps.slice(slice(start_step, None))
    # One thread works ahead while the devices are busy; grain's default is 16, and 500 batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def _check_arguments(name: str, batch_size: int, seed: int, test_fraction: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size of {name} is {batch_size}: use 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed of {name} is {seed}: use 0 to {2**32 - 1}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction of {name} is {test_fraction}: use a number in (0, 1)")


def _read(source: str | Path) -> bytes:
    if source == "topics":
        from pydoc_data.topics import topics

        return "".join(topics[key] for key in sorted(topics)).encode()
    if source == "stdlib":
        return b"".join(path.read_bytes() for path in _stdlib_files())
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot read text file {source}: {error.strerror}; give the path of a readable file, "
            "'topics' or 'stdlib'",
        ) from error
    if not content:
        raise ValueError(f"text file {source} is empty: give a file with text")
    return content


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
