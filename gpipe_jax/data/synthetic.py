"""Make data sets of random images and tokens, to measure speed and memory."""

from collections.abc import Callable

import numpy as np

from gpipe_jax.data.stream import Batch, Dataset, check_arguments, dataset
from gpipe_jax.utils.checks import check_counts


def synthetic_images(batch_size: int, seed: int, *, image: int, classes: int) -> Dataset:
    """Make endless noise images, to test whether a large network fits and how fast it is.

    An example depends only on the seed and its index.

    Args:
        batch_size: Images of a batch (N of the pipeline).
        seed: Determines the images.
        image: The side S of an image, in pixels.
        classes: The number of classes.

    Returns:
        The data set; inputs: float32 [B, S, S, 3], uniform with mean 0 and deviation 1; labels:
        int32 [B], below `classes`.

    Raises:
        ValueError: An argument is out of range.

    Example::

        dataset = gpipe.data.synthetic_images(256, seed=0, image=224, classes=1000)
    """
    check_counts(image=image, classes=classes)

    def example(rng: np.random.Generator) -> Batch:
        pixels = rng.random((image, image, 3), np.float32)
        pixels -= np.float32(0.5)  # in place: noise must cost little of the time
        pixels *= np.float32(12**0.5)
        return {"inputs": pixels, "labels": np.asarray(rng.integers(classes), np.int32)}

    return _synthetic("synthetic_images", batch_size, seed, example)


def synthetic_tokens(batch_size: int, length: int, vocabulary: int, seed: int) -> Dataset:
    """Make endless random tokens, to test whether a large network fits and how fast it is.

    Args:
        batch_size: Sequences of a batch (N of the pipeline).
        length: The tokens T of a sequence.
        vocabulary: The number of different tokens.
        seed: Determines the tokens.

    Returns:
        The data set; inputs: int32 [B, T], below `vocabulary`; labels: int32 [B, T], the token
        after each.

    Raises:
        ValueError: An argument is out of range.

    Example::

        dataset = gpipe.data.synthetic_tokens(32, length=512, vocabulary=50_000, seed=0)
    """
    check_counts(length=length, vocabulary=vocabulary)

    def example(rng: np.random.Generator) -> Batch:
        tokens = rng.integers(vocabulary, size=length + 1, dtype=np.int32)
        return {"inputs": tokens[:-1], "labels": tokens[1:]}

    return _synthetic("synthetic_tokens", batch_size, seed, example)


def _synthetic(
    name: str, batch_size: int, seed: int, example: Callable[[np.random.Generator], Batch]
) -> Dataset:
    check_arguments(name, batch_size, seed)

    def gather(index_B: np.ndarray) -> Batch:
        examples = [example(np.random.default_rng([seed, index])) for index in index_B]
        return {key: np.stack([each[key] for each in examples]) for key in ("inputs", "labels")}

    endless = 2**31 - 1  # examples in an epoch
    return dataset(name, batch_size, seed, (gather, endless), (gather, 2 * batch_size))
