"""Make the data that config.yaml names: a function of eight numbers, with a little noise."""

import numpy as np

import gpipe_jax as gpipe


def make(batch_size: int, seed: int, examples: int) -> gpipe.data.Dataset:
    """Return the data set; the last 200 examples are held out."""
    rng = np.random.default_rng(0)  # the same examples for every seed of the run
    inputs = rng.normal(size=(examples + 200, 8)).astype(np.float32)
    labels = np.sin(inputs[:, :1]) * inputs[:, 1:2] + 0.5 * inputs[:, 2:3]
    labels = (labels + rng.normal(scale=0.01, size=labels.shape)).astype(np.float32)

    def train(index: np.ndarray) -> dict:
        return {"inputs": inputs[index], "labels": labels[index]}

    def test(index: np.ndarray) -> dict:
        return train(examples + index)

    return gpipe.data.dataset("a function", batch_size, seed, (train, examples), (test, 200))
