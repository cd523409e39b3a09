"""Make seeded, restartable streams of batches, from data on this machine; numpy only."""

from gpipe_jax.data.files import array_record, arrays
from gpipe_jax.data.images import cifar10, digits
from gpipe_jax.data.python_source import python
from gpipe_jax.data.rules import Rules
from gpipe_jax.data.stream import Batch, Dataset, dataset, iterable
from gpipe_jax.data.synthetic import synthetic_images, synthetic_tokens
from gpipe_jax.data.text_files import text
from gpipe_jax.errors import DataError

# The data sets of configs: `data.kind` is the name here, and the section's fields are arguments.
DATASETS = {
    "digits": digits,
    "text": text,
    "cifar10": cifar10,
    "arrays": arrays,
    "array_record": array_record,
    "python": python,
    "synthetic_images": synthetic_images,
    "synthetic_tokens": synthetic_tokens,
}

__all__ = [
    "DATASETS",
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
