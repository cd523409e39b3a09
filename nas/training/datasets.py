"""The images that candidates are trained and judged on, all of them on the device.

The test images, those that `gpipe train` evaluates on with seed 0, are not among them. Letters: N
images, B images of a batch, S pixels each way, C channels.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax import data
from gpipe_jax.data import cifar10_files, images
from nas.training.options import DATASETS


class Split(NamedTuple):
    """What is trained on, and what is held out to judge by."""

    images: np.ndarray  # [N, S, S, C] float32
    labels: np.ndarray  # [N] int32
    held_images: np.ndarray
    held_labels: np.ndarray

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + int(max(self.labels.max(), self.held_labels.max()))


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random, as `gpipe train` does it."""

    shift: int = 0  # moved by up to so many pixels each way
    flip: bool = False  # mirrored left to right, every other one
    fill: float = 0.0  # what a shift uncovers

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Images [B, S, S, C], each changed by its own chance."""
        places, sides = jax.random.split(key)
        if self.flip:
            mirrored = jax.random.bernoulli(sides, 0.5, (x.shape[0], 1, 1, 1))
            x = jnp.where(mirrored, x[:, :, ::-1], x)
        return self._shifted(x, places) if self.shift else x

    def _shifted(self, x: jax.Array, key: jax.Array) -> jax.Array:
        most, (B, S, _, C) = self.shift, x.shape
        pad = ((0, 0), (most, most), (most, most), (0, 0))
        padded = jnp.pad(x, pad, constant_values=self.fill)
        corners = jax.random.randint(key, (B, 2), 0, 2 * most + 1)
        cut = lambda a, at: jax.lax.dynamic_slice(a, (at[0], at[1], 0), (S, S, C))  # noqa: E731
        return jax.vmap(cut)(padded, corners)


class Source(NamedTuple):
    """Where images come from. `load(folder)` gives all training images and their labels."""

    load: Callable[[str | None], tuple[np.ndarray, np.ndarray]]
    held_out: Callable[[int], int]  # how many to hold out of so many, if that is not given
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Data:
    """Which images: `validation_images` of them held out to judge by, and `examples` of the rest.

    Both draws are the same for every candidate and keep the classes in proportion.
    """

    name: str  # one of `names.DATASETS`, or a .npz file with `inputs` and `labels`
    folder: str | None = (
        None  # of the files of cifar10, see `gpipe_jax.data.cifar10_files.read_cifar10`
    )
    validation_images: int | None = None
    examples: int | None = None
    digest: str | None = None  # of a file, so that another one of its name is another data set

    def split(self) -> Split:
        """The images; ValueError or OSError says what cannot be had."""
        return _split(self)


@functools.lru_cache(maxsize=4)
def _split(wanted: Data) -> Split:
    name, found = wanted.name, source(wanted.name)
    everything, labels = found.load(wanted.folder)
    count = len(labels)
    held = wanted.validation_images
    if held is None:
        held = found.held_out(count)
    if not 0 < held < count:
        raise ValueError(
            f"validation_images {held}: {name} has {count} images for training and validation, and "
            f"neither may be without; give 1 to {count - 1}"
        )
    used = count - held if wanted.examples is None else wanted.examples
    if not 0 < used <= count - held:
        raise ValueError(
            f"examples {used}: {name} has {count - held} training images beside the {held} held "
            f"out; give 1 to {count - held}"
        )
    out = _spread(labels, held)
    rest = np.setdiff1d(np.arange(count), out)
    rest = rest[_spread(labels[rest], used)]
    return Split(everything[rest], labels[rest], everything[out], labels[out])


def digest(path: str) -> str:
    """The SHA-256 of a file, or a folder's arrays, read again only when changed; or OSError."""
    here = Path(path)
    files = sorted(here.glob("*.npy")) if here.is_dir() else [here]
    about = [file.stat() for file in files]
    stamps = zip(files, (a.st_size for a in about), (a.st_mtime_ns for a in about), strict=True)
    return _digest(tuple(stamps))


@functools.lru_cache(maxsize=16)
def _digest(stamps: tuple[tuple, ...]) -> str:
    found = hashlib.sha256()
    for path, *_ in stamps:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def source(name: str) -> Source:
    """The data set of that name, or the file."""
    if name in _SOURCES:
        return _SOURCES[name]
    return Source(lambda _: _whole(lambda size: data.arrays(name, size, 0)), lambda n: n // 10)


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of so many examples, drawn with the classes in proportion."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[np.arange(count) * len(labels) // count])


def _whole(make: Callable[[int], data.Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """All training examples of a data set by batch size: the first batch of that many."""
    count = make(1).train_examples
    batch = next(make(count or 1).train(0))
    inputs = batch["inputs"]
    if inputs.ndim != 4 or inputs.shape[1] != inputs.shape[2]:
        raise ValueError(
            f"inputs have the shape {list(inputs.shape)}: candidates are trained on square images, "
            "[N, pixels, pixels, channels]; give such"
        )
    return inputs, batch["labels"]


def _cifar10(folder: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    train, _ = cifar10_files.read_cifar10(folder)
    return cifar10_files.normalised(train.pixels), train.labels


_SOURCES = {
    "digits": Source(
        lambda _: _whole(lambda size: images.digits(size, 0)),
        lambda n: n // 4,
        Augmentation(shift=1, fill=-1.0),
    ),
    "cifar10": Source(_cifar10, lambda n: n // 10, Augmentation(shift=4, flip=True)),
}
assert tuple(_SOURCES) == DATASETS
