"""Make data sets of images: scikit-learn's digits, and CIFAR-10; and augment them.

Letters: B images of a batch, S pixels each way, C channels.
"""

import functools
from pathlib import Path

import numpy as np

from gpipe_jax.data.cifar10_files import Images, normalised, read_cifar10
from gpipe_jax.data.stream import Batch, Dataset, Draws, check_arguments, dataset
from gpipe_jax.utils.checks import check_fraction
from gpipe_jax.utils.text import install_advice


def digits(batch_size: int, seed: int, *, test_fraction: float = 0.2, shift: int = 0) -> Dataset:
    """Load scikit-learn's 1797 handwritten digits.

    Args:
        batch_size: Images of a batch (N of the pipeline).
        seed: Determines the split (in which the classes stay in proportion), the order of the
            training images and their shifts.
        test_fraction: The fraction of the images to hold out. Default: 0.2.
        shift: Move each training image by up to this many pixels each way. Default: 0.

    Returns:
        The data set; inputs: float32 [B, 8, 8, 1] from -1 to 1, of mean -0.4; labels: int32 [B],
        0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: An argument is out of range.

    Example::

        dataset = gpipe.data.digits(batch_size=64, seed=0, shift=1)
        first = next(dataset.train(0))  # {"inputs": [64, 8, 8, 1], "labels": [64]}
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            f"the digits come with scikit-learn: {install_advice('examples')}"
        ) from error
    check_arguments("digits", batch_size, seed)
    check_fraction("test_fraction", test_fraction, zero=False)
    images, targets = load_digits(return_X_y=True)
    inputs = (np.asarray(images) / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
    labels = np.asarray(targets, np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
    )

    def gather(split: np.ndarray, index_B: np.ndarray) -> Batch:
        return {"inputs": inputs[split[index_B]], "labels": labels[split[index_B]]}

    train, test = (
        (functools.partial(gather, np.sort(split)), len(split)) for split in (train, test)
    )
    augment = functools.partial(_augment_digits, shift) if shift else None
    return dataset("digits", batch_size, seed, train, test, augment=augment)


def _augment_digits(shift: int, batch: Batch, rng: Draws) -> Batch:
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
    """Read CIFAR-10: 50,000 images for training and 10,000 for testing, in ten classes.

    Training images are moved by up to 4 pixels each way, mirrored left to right with probability
    one half, and lose a square of `cutout` pixels each way. Pixels that are uncovered or cut out
    are zero, the mean colour.

    Args:
        batch_size: Images of a batch (N of the pipeline).
        seed: Determines the order of the training images and their changes.
        folder: The folder of the published files; see `cifar10_files.read_cifar10`. Default: the
            folder of the environment variable GPIPE_JAX_DATA.
        validation: Hold out this many of the training images in place of the test images; which
            ones does not depend on the seed. 0 uses the test images. Default: 0.
        cutout: Side of the square to cut out, in pixels; 0 cuts nothing. Default: 0.
        augment: Whether to change training images as above. Default: True.

    Returns:
        The data set; inputs: float32 [B, 32, 32, 3], each channel of mean 0 and deviation 1 over
        the training images; labels: int32 [B].

    Raises:
        FileNotFoundError: The files are not there.
        ValueError: A file is damaged, or an argument is out of range.

    Example::

        dataset = gpipe.data.cifar10(batch_size=128, seed=0, folder="~/data", cutout=16)

    Source: the changes are those of Real et al. 2019, https://arxiv.org/abs/1802.01548; cutout is
    of DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552.
    """
    check_arguments("cifar10", batch_size, seed)
    if not 0 <= cutout <= 32:
        raise ValueError(f"cutout of cifar10 is {cutout}: use 0 (none) to 32 pixels")
    train, test = read_cifar10(folder)
    if validation:
        train, test = _hold_out(train, validation)

    def gather(split: Images, index_B: np.ndarray) -> Batch:
        return {"inputs": normalised(split.pixels[index_B]), "labels": split.labels[index_B]}

    return dataset(
        "cifar10",
        batch_size,
        seed,
        (functools.partial(gather, train), len(train.labels)),
        (functools.partial(gather, test), len(test.labels)),
        augment=functools.partial(_augment_cifar10, cutout) if augment else None,
    )


def _hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """Return all but `count` of the images, and these; the choice is always the same."""
    total = len(images.labels)
    if not 0 < count < total:
        raise ValueError(
            f"validation of cifar10 is {count}: use 0 (the test images) to {total - 1} of the "
            f"{total} training images"
        )
    order = np.random.default_rng(0).permutation(total)
    train, held_out = np.sort(order[count:]), np.sort(order[:count])
    return Images(*(a[train] for a in images)), Images(*(a[held_out] for a in images))


def _augment_cifar10(cutout: int, batch: Batch, rng: Draws) -> Batch:
    inputs = flipped(shifted(batch["inputs"], rng, most=4), rng)
    return {**batch, "inputs": cut_out(inputs, rng, size=cutout) if cutout else inputs}


def shifted(images: np.ndarray, rng: Draws, *, most: int, fill: float = 0.0) -> np.ndarray:
    """Move each image of [B, S, S, C] by up to `most` pixels each way; uncovered are `fill`."""
    size = images.shape[1]
    pad = ((0, 0), (most, most), (most, most), (0, 0))
    padded = np.pad(images, pad, constant_values=fill)
    corners = rng.integers(0, 2 * most + 1, 2)
    moved = [a[r : r + size, c : c + size] for a, (r, c) in zip(padded, corners, strict=True)]
    return np.stack(moved)


def flipped(images: np.ndarray, rng: Draws) -> np.ndarray:
    """Mirror each image of [B, S, S, C] left to right with probability one half."""
    mirrored = rng.random() < 0.5
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def cut_out(images: np.ndarray, rng: Draws, *, size: int) -> np.ndarray:
    """Set a square of `size` pixels each way to zero in each image of [B, S, S, C].

    Its centre is any pixel, so some of the square may be outside (DeVries and Taylor, Improved
    Regularization of Convolutional Neural Networks with Cutout, section 3.2).
    """
    pixels = np.arange(images.shape[1])
    start_2B1 = rng.integers(0, len(pixels), 2).T[:, :, None] - size // 2
    rows_BS, columns_BS = (start_2B1 <= pixels) & (pixels < start_2B1 + size)
    return np.where(rows_BS[:, :, None, None] & columns_BS[:, None, :, None], 0, images)
