"""Make data sets of images: scikit-learn's digits, and CIFAR-10."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpipe_jax.data.cifar10_files import Images, normalised, read_cifar10
from gpipe_jax.data.stream import Batch, Dataset, Draws, check_arguments, check_fraction, dataset


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


def shifted(images: np.ndarray, rng: Draws, *, most: int, fill: float = 0.0) -> np.ndarray:
    """Each image of [B, S, S, C] moved by up to `most` pixels each way, its edge set to `fill`."""
    size = images.shape[1]
    pad = ((0, 0), (most, most), (most, most), (0, 0))
    padded = np.pad(images, pad, constant_values=fill)
    corners = rng.integers(0, 2 * most + 1, 2)
    moved = [a[r : r + size, c : c + size] for a, (r, c) in zip(padded, corners, strict=True)]
    return np.stack(moved)


def flipped(images: np.ndarray, rng: Draws) -> np.ndarray:
    """Each image of [B, S, S, C] mirrored left to right with probability one half."""
    mirrored = rng.random() < 0.5
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def cut_out(images: np.ndarray, rng: Draws, *, size: int) -> np.ndarray:
    """Each image of [B, S, S, C] with a square of `size` pixels each way set to zero.

    Its centre is any pixel, so part of it may be outside (DeVries and Taylor, Improved
    Regularization of Convolutional Neural Networks with Cutout, section 3.2).
    """
    pixels = np.arange(images.shape[1])
    start_2B1 = rng.integers(0, len(pixels), 2).T[:, :, None] - size // 2
    rows_BS, columns_BS = (start_2B1 <= pixels) & (pixels < start_2B1 + size)
    return np.where(rows_BS[:, :, None, None] & columns_BS[:, None, :, None], 0, images)
