"""Pickle values, also functions of notebooks if cloudpickle is installed, as it is with dask."""

import io
import pickle
from typing import IO, Any


def dumps(value: Any) -> bytes:
    """Pickle a value as `dump` does."""
    file = io.BytesIO()
    dump(value, file)
    return file.getvalue()


def dump(value: Any, file: IO[bytes]) -> None:
    """Pickle a value; with cloudpickle, which comes with dask, also functions of notebooks."""
    try:
        import cloudpickle
    except ImportError:
        pickle.dump(value, file)
    else:
        cloudpickle.dump(value, file)
