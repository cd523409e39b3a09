"""Load the images that candidates are trained and validated on, all of them onto the device.

The test images, on which `gpipe train` evaluates with seed 0, are not among them. Letters: N
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
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths
from nas.training import file_checks


class Split(NamedTuple):
    """Hold the images for training, and those held out for validation."""

    images: np.ndarray  # [N, S, S, C] float32
    labels: np.ndarray  # [N] int32
    held_images: np.ndarray
    held_labels: np.ndarray

    @property
    def classes(self) -> int:
        """Return one more than the largest label."""
        return 1 + int(max(self.labels.max(), self.held_labels.max()))


@dataclass(frozen=True)
class Augmentation:
    """Change training images at random, as `gpipe train` does."""

    shift: int = 0  # pixels each way, at most
    flip: bool = False  # mirror left to right with probability 1/2
    fill: float = 0.0  # value of the pixels that a shift uncovers

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Change each of the images [B, S, S, C] independently."""
        shift_key, flip_key = jax.random.split(key)
        if self.flip:
            is_flipped = jax.random.bernoulli(flip_key, 0.5, (x.shape[0], 1, 1, 1))
            x = jnp.where(is_flipped, x[:, :, ::-1], x)
        return self._shifted(x, shift_key) if self.shift else x

    def _shifted(self, x: jax.Array, key: jax.Array) -> jax.Array:
        B, S, _, C = x.shape
        pad = ((0, 0), (self.shift, self.shift), (self.shift, self.shift), (0, 0))
        padded = jnp.pad(x, pad, constant_values=self.fill)
        corners = jax.random.randint(key, (B, 2), 0, 2 * self.shift + 1)

        def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (S, S, C))

        return jax.vmap(crop)(padded, corners)


class Source(NamedTuple):
    """Say where images come from and how they are used by default."""

    load: Callable[[str | None], tuple[np.ndarray, np.ndarray]]
    """Return all training images and their labels; the argument is a folder."""
    held_out: Callable[[int], int]
    """Return the default number of images to hold out, given the number of all images."""
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Data:
    """Select images: `validation_images` to hold out for validation, and `examples` of the rest.

    Both draws are the same for every candidate and keep the classes in proportion.
    """

    name: str  # one of `nas.choices.DATASETS`, or a .npz file with `inputs` and `labels`
    folder: str | None = None  # of the files of cifar10; see `gpipe_jax.data.cifar10_files`
    validation_images: int | None = None
    examples: int | None = None
    digest: str | None = None  # of a file, so that another file of its name is another data set

    def split(self) -> Split:
        """Load the images, or return them from a cache.

        Raises:
            ValueError: `validation_images` or `examples` is less than 1 or more than there are, or
                the images have another shape.
            OSError: The files cannot be read.
        """
        return _split(self)


@functools.lru_cache(maxsize=4)
def _split(selection: Data) -> Split:
    name, origin = selection.name, source(selection.name)
    inputs, labels = origin.load(selection.folder)
    count = len(labels)
    held = selection.validation_images
    if held is None:
        held = origin.held_out(count)
    if not 0 < held < count:
        raise ArgumentError(
            "validation_images",
            f"validation_images {held}: {name} has {count} images for training and validation, and "
            f"both need at least one; use 1 to {count - 1}",
        )
    used = count - held if selection.examples is None else selection.examples
    if not 0 < used <= count - held:
        raise ArgumentError(
            "examples",
            f"examples {used}: {name} has {count - held} training images besides the {held} held "
            f"out; use 1 to {count - held}",
        )
    held_out = _proportional(labels, held)
    rest = np.setdiff1d(np.arange(count), held_out)
    rest = rest[_proportional(labels[rest], used)]
    return Split(inputs[rest], labels[rest], inputs[held_out], labels[held_out])


def digest(path: str) -> str:
    """Return the SHA-256 of a file, or of a folder's .npy files.

    They are read again only if their sizes or times have changed.

    Raises:
        OSError: They cannot be read.
    """
    root = paths.local("data", path)
    files = sorted(root.glob("*.npy")) if root.is_dir() else [root]
    stats = [file.stat() for file in files]
    return _digest(
        tuple((file, a.st_size, a.st_mtime_ns) for file, a in zip(files, stats, strict=True))
    )


@functools.lru_cache(maxsize=16)
def _digest(stamps: tuple[tuple, ...]) -> str:
    sha256 = hashlib.sha256()
    for path, *_ in stamps:
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


def source(name: str) -> Source:
    """Return the source of a data set, or of a file with arrays."""
    if name in _SOURCES:
        return _SOURCES[name]

    def make(batch_size: int) -> data.Dataset:
        return data.arrays(name, batch_size, 0)

    def load(_: str | None) -> tuple[np.ndarray, np.ndarray]:
        make(1)  # for its errors, if the file cannot be read
        file_checks.check(name)
        return _all_examples(make)

    return Source(load, _a_tenth)


def _proportional(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of `count` examples, drawn with the classes in proportion."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[np.arange(count) * len(labels) // count])


def _all_examples(make: Callable[[int], data.Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Return all training examples of a data set: its first batch if a batch has them all.

    `make` returns the data set with a batch size.
    """
    count = make(1).train_examples
    batch = next(make(count or 1).train(0))
    return batch["inputs"], batch["labels"]


def _digits(_: str | None) -> tuple[np.ndarray, np.ndarray]:
    return _all_examples(lambda size: images.digits(size, 0))


def _cifar10(folder: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    train, _ = cifar10_files.read_cifar10(folder)
    return cifar10_files.normalised(train.pixels), train.labels


def _a_quarter(count: int) -> int:
    return count // 4


def _a_tenth(count: int) -> int:
    return count // 10


_SOURCES: dict[str, Source] = {  # by name, one of each of `nas.choices.DATASETS`
    "digits": Source(_digits, _a_quarter, Augmentation(shift=1, fill=-1.0)),
    "cifar10": Source(_cifar10, _a_tenth, Augmentation(shift=4, flip=True)),
}
