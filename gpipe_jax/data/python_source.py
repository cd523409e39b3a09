"""Make a data set from a function of the user's own code."""

from collections.abc import Mapping
from typing import Any

from gpipe_jax import own_code
from gpipe_jax.data.stream import Dataset, check_arguments
from gpipe_jax.errors import ArgumentError


def python(
    source: str,
    batch_size: int,
    seed: int,
    arguments: Mapping[str, Any] | None = None,
    folder: own_code.Folder = None,
) -> Dataset:
    """Make a data set with a function of the user's own code.

    Args:
        source: The file and the function, as "my_data.py:make", or an installed module and the
            function, as "package.module:make". The function is called as `make(batch_size=...,
            seed=..., **arguments)` and returns a `gpipe_jax.data.Dataset`.
        batch_size: Examples of a batch (N of the pipeline).
        seed: The seed of the run.
        arguments: Further arguments of the function. Default: none.
        folder: Where to look for the file before the current folder. Default: nowhere.

    Returns:
        The data set that the function returned.

    Raises:
        ArgumentError: `source` does not name a function, an argument does not fit, or the function
            raised an error or returned something else.

    Example::

        dataset = gpipe.data.python("my_data.py:make", batch_size=64, seed=0)
    """
    check_arguments(f"python {source}", batch_size, seed)
    given = {"batch_size": batch_size, "seed": seed}
    dataset = own_code.call(source, arguments or {}, folder, setting="source", given=given)
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ArgumentError(
            "source",
            f"`source` {source} returned a {kind}; it must return a gpipe_jax.data.Dataset",
        )
    return dataset
