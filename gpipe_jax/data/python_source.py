"""Make a data set from a function of the user's own Python file."""

import importlib.util
import re
import sys
import zlib
from pathlib import Path
from typing import Any

from gpipe_jax.data.stream import Dataset, check_arguments
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths


def python(source: str, batch_size: int, seed: int) -> Dataset:
    """Make a data set with a function of the user's own Python file.

    Args:
        source: The file and the function, as "my_data.py:make". The function is called as
            `make(batch_size=..., seed=...)` and returns a `gpipe_jax.data.Dataset`.
        batch_size: Examples of a batch (N of the pipeline).
        seed: The seed of the run.

    Returns:
        The data set that the function returned.

    Raises:
        FileNotFoundError: The file does not exist, or `source` does not name a function.
        ValueError: The function raised an error, or returned something else.

    Example::

        dataset = gpipe.data.python("my_data.py:make", batch_size=64, seed=0)
    """
    check_arguments(f"python {source}", batch_size, seed)
    path, name = split_source(source)
    if path.suffix != ".py" or not path.is_file() or not name.isidentifier():
        raise FileNotFoundError(
            f"`source` {source} is not a function of a Python file; give one as my_data.py:make"
        )
    dataset: Any = _call(str(path), name, batch_size=batch_size, seed=seed)
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ArgumentError(
            "source",
            f"`source` {source} returned a {kind}; it must return a gpipe_jax.data.Dataset",
        )
    return dataset


def split_source(source: str) -> tuple[Path, str]:
    """Return the file and the name of the function of a source such as "my_data.py:make"."""
    path, _, name = source.rpartition(":")
    return paths.local("source", path), name


def _call(path: str, name: str, **arguments: int) -> Any:
    # The module gets a name that no import has: a user's random.py must not replace `random`.
    # It has no dots, which pickle would take for packages: its objects may go to other processes.
    stem, crc = re.sub(r"\W", "_", Path(path).stem), zlib.crc32(bytes(Path(path).resolve()))
    spec = importlib.util.spec_from_file_location(f"gpipe_source_{stem}_{crc:x}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)(**arguments)
    # The user's own code may raise anything, and may end the process: then nothing is trained.
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            "source",
            f"`source` {path}:{name} raised {type(error).__name__}: {error}; call it in Python to "
            f"see where",
        ) from error
