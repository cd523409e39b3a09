"""Make a data set from a function of the user's own Python file."""

import importlib.util
import re
import sys
import zlib
from pathlib import Path
from typing import Any

from gpipe_jax.data.stream import Dataset, check_arguments


def python(source: str, batch_size: int, seed: int) -> Dataset:
    """Return what a function of a Python file makes: `source` is "my_data.py:make".

    It is called as make(batch_size=..., seed=...).
    """
    path, _, name = source.rpartition(":")
    check_arguments(f"python {source}", batch_size, seed)
    if not path.endswith(".py") or not Path(path).is_file() or not name.isidentifier():
        raise FileNotFoundError(
            f"`source` {source} is no function of a Python file; give one as my_data.py:make"
        )
    made: Any = _call(path, name, batch_size=batch_size, seed=seed)
    if not isinstance(made, Dataset):
        kind = type(made).__name__
        raise ValueError(f"`source` {source} made a {kind}; it must make a gpipe_jax.data.Dataset")
    return made


def _call(path: str, name: str, **arguments: int) -> Any:
    # A name that no import gives: a user's random.py must not become everybody's `random`.
    # Without dots, in which pickle looks for packages: what it has may go to other processes.
    stem, crc = re.sub(r"\W", "_", Path(path).stem), zlib.crc32(bytes(Path(path).resolve()))
    spec = importlib.util.spec_from_file_location(f"gpipe_source_{stem}_{crc:x}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)(**arguments)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(
            f"`source` {path}:{name} raised {type(error).__name__}: {error}; call it in Python to "
            f"see where"
        ) from error
