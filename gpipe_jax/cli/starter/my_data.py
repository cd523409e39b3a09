"""Make the data set of config.yaml: put your own arrays in place of the digits."""

import sklearn.datasets

import gpipe_jax as gpipe


def make(batch_size: int, seed: int) -> gpipe.data.Dataset:
    """Return 1440 training examples, and 357 to evaluate on."""
    images, digits = sklearn.datasets.load_digits(return_X_y=True)
    inputs, labels = (images / 16).astype("float32"), digits.astype("int32")

    def train(index):
        return {"inputs": inputs[index], "labels": labels[index]}

    def test(index):
        return train(1440 + index)

    return gpipe.data.dataset("my digits", batch_size, seed, (train, 1440), (test, 357))
