"""Data sets, none of which needs the network. See `stream` for what their batches have in common.

Letters: B batch_size, T length, S pixels each way.
"""

import errno
import functools
import glob
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpipe_jax.data.cifar10_files import Images, cut_out, flipped, normalised, read_cifar10, shifted
from gpipe_jax.data.dataset import (
    Batch,
    DataError,
    Dataset,
    Draws,
    check_arguments,
    check_counts,
    check_fraction,
    dataset,
    iterable,
)
from gpipe_jax.data.files import Rules, array_record, arrays, expand, python

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Rules",
    "array_record",
    "arrays",
    "cifar10",
    "dataset",
    "digits",
    "iterable",
    "python",
    "synthetic_images",
    "synthetic_tokens",
    "text",
]


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
    check_arguments("digits", batch_size, seed)
    check_fraction("digits", test_fraction)
    images, targets = load_digits(return_X_y=True)
    inputs = (np.asarray(images) / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
    labels = np.asarray(targets, np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
    )
    parts = np.sort(train), np.sort(test)

    def gather(part: np.ndarray) -> Callable[[np.ndarray], Batch]:
        return lambda index_B: {"inputs": inputs[part[index_B]], "labels": labels[part[index_B]]}

    return dataset(
        "digits",
        batch_size,
        seed,
        *((gather(part), len(part)) for part in parts),
        augment=functools.partial(_digits_augmented, shift) if shift else None,
    )


def _digits_augmented(shift: int, batch: Batch, rng: Draws) -> Batch:
    return {**batch, "inputs": shifted(batch["inputs"], rng, most=shift, fill=-1.0)}


def cifar10(
    batch_size: int,
    seed: int,
    *,
    folder: str | Path | None = None,
    validation: int = 0,
    cutout: int = 0,
    augment: bool = True,
) -> Dataset:
    """Return CIFAR-10: 50,000 images for training and 10,000 for testing, in ten classes.

    inputs: float32 [B, 32, 32, 3], each channel of mean 0 and deviation 1; labels: int32 [B].
    `folder` is where the files are, see `images.read_cifar10`. If `validation` is not 0, so many of
    the training images are held out in place of the test images, whatever the seed the same ones.

    Training images are moved by up to 4 pixels each way, mirrored left to right, and lose a square
    of `cutout` pixels each way; what is uncovered or cut out is zero, the mean colour. With
    `augment=False` they stay as they are.
    """
    check_arguments("cifar10", batch_size, seed)
    if not 0 <= cutout <= 32:
        raise ValueError(f"cutout of cifar10 is {cutout}: use 0 (none) to 32 pixels")
    train, test = read_cifar10(folder)
    if validation:
        train, test = _hold_out(train, validation)

    def gather(part: Images) -> Callable[[np.ndarray], Batch]:
        return lambda index_B: {
            "inputs": normalised(part.pixels[index_B]),
            "labels": part.labels[index_B],
        }

    return dataset(
        "cifar10",
        batch_size,
        seed,
        *((gather(part), len(part.labels)) for part in (train, test)),
        augment=functools.partial(_cifar10_augmented, cutout) if augment else None,
    )


def _hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """All but `count` of the images, and these: a draw that depends on nothing."""
    total = len(images.labels)
    if not 0 < count < total:
        raise ValueError(
            f"validation of cifar10 is {count}: use 0 (the test images) to {total - 1} of the "
            f"{total} training images"
        )
    order = np.random.default_rng(0).permutation(total)
    train, held_out = np.sort(order[count:]), np.sort(order[:count])
    return Images(*(a[train] for a in images)), Images(*(a[held_out] for a in images))


def _cifar10_augmented(cutout: int, batch: Batch, rng: Draws) -> Batch:
    inputs = flipped(shifted(batch["inputs"], rng, most=4), rng)
    return {**batch, "inputs": cut_out(inputs, rng, size=cutout) if cutout else inputs}


def synthetic_images(batch_size: int, seed: int, *, image: int, classes: int) -> Dataset:
    """Return noise without end, to see whether a large network fits and how fast it is.

    inputs: float32 [B, S, S, 3] for an `image` of S, uniform with mean 0 and deviation 1; labels:
    int32 [B], any of `classes`. An example is a function of the seed and its index.
    """
    check_counts("synthetic_images", image=image, classes=classes)

    def example(rng: np.random.Generator) -> Batch:
        pixels = rng.random((image, image, 3), np.float32)
        pixels -= np.float32(0.5)  # in place: making noise must not be what is measured
        pixels *= np.float32(12**0.5)
        return {"inputs": pixels, "labels": np.asarray(rng.integers(classes), np.int32)}

    return _synthetic("synthetic_images", batch_size, seed, example)


def synthetic_tokens(batch_size: int, length: int, vocabulary: int, seed: int) -> Dataset:
    """Return random tokens without end, for the same purpose.

    inputs: int32 [B, T], any of `vocabulary`; labels: int32 [B, T], the token after each.
    """
    check_counts("synthetic_tokens", length=length, vocabulary=vocabulary)

    def example(rng: np.random.Generator) -> Batch:
        tokens = rng.integers(vocabulary, size=length + 1, dtype=np.int32)
        return {"inputs": tokens[:-1], "labels": tokens[1:]}

    return _synthetic("synthetic_tokens", batch_size, seed, example)


def _synthetic(
    name: str, batch_size: int, seed: int, example: Callable[[np.random.Generator], Batch]
) -> Dataset:
    check_arguments(name, batch_size, seed)

    def gather(index_B: np.ndarray) -> Batch:
        made = [example(np.random.default_rng([seed, index])) for index in index_B]
        return {key: np.stack([one[key] for one in made]) for key in ("inputs", "labels")}

    endless = 2**31 - 1  # examples in an epoch
    return dataset(name, batch_size, seed, (gather, endless), (gather, 2 * batch_size))


def text(
    source: str | Path, batch_size: int, length: int, seed: int, *, test_fraction: float = 0.1
) -> Dataset:
    """Return next-byte prediction on a text.

    inputs: int32 [B, T] of bytes; labels: int32 [B, T], the byte after each. `source` is one of

    - "topics": the help texts of `pydoc_data.topics`, 0.5 MB, in the order of their keys;
    - "stdlib": the standard library's .py files, without tests and site-packages, 13 MB, in the
      order of their paths. Both differ between Python versions: compare losses on one only;
    - the path of a file, or a glob (books/**/*.txt) of files, which are read as one, in order.

    The last `test_fraction` of the bytes is held out, in one piece: windows overlap, so windows
    held out at random would have been read in training. It depends on neither seed nor length. It
    is cut into windows that predict each byte once, the very first from the last training byte;
    what is left of a window at the end is dropped. A training example starts at any byte.
    """
    check_arguments(f"text {source}", batch_size, seed)
    check_fraction(f"text {source}", test_fraction)
    data = _read(source)
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

    return dataset(
        f"text {source}",
        batch_size,
        seed,
        (gather, split - length),
        (lambda window_B: gather(split - 1 + window_B * length), held_out // length),
    )


def _read(source: str | Path) -> np.ndarray:
    """Its bytes; those of a single file are mapped, and read where they are needed."""
    if source == "topics":
        from pydoc_data.topics import topics

        return _bytes("".join(topics[key] for key in sorted(topics)).encode())
    if source == "stdlib":
        return _bytes(b"".join(path.read_bytes() for path in _stdlib_files()))
    path = Path(source).expanduser()
    try:
        if glob.has_magic(str(path)) and not path.exists():
            paths = expand(str(path))
            if not paths:
                raise FileNotFoundError(errno.ENOENT, "no file matches it")
            data = _bytes(b"".join(Path(each).read_bytes() for each in paths))
        elif path.stat().st_size:
            data = np.memmap(path, np.uint8, mode="r")
        else:
            data = _bytes(path.read_bytes())
    except OSError as error:
        raise OSError(
            error.errno,
            f"`source`: cannot read text file {source}: {error.strerror}; give the path of a "
            "readable file, a glob of such, 'topics' or 'stdlib'",
        ) from error
    if not len(data):
        raise ValueError(f"`source`: text file {source} is empty: give a file with text")
    return data


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
