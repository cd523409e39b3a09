"""Make data sets of random images and tokens."""

from collections.abc import Callable

import numpy as np

from gpipe_jax.data.stream import Batch, Dataset, check_arguments, check_counts, dataset


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
