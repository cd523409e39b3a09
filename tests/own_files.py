"""Write arrays of numbered examples to files.

Never rewrite a file that may be memory-mapped: reading it would crash the process.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = 150


def example_arrays(count: int = EXAMPLES) -> dict[str, np.ndarray]:
    """Return inputs [N, 3] of float64 that give their index, and labels."""
    inputs = np.arange(3 * count, dtype=np.float64).reshape(count, 3)
    return {"inputs": inputs, "labels": np.arange(count) % 10}


def npz(folder: Path, name: str = "own.npz", **arrays: Any) -> Path:
    if arrays or not (folder / name).exists():
        np.savez(folder / name, **(arrays or example_arrays()))
    return folder / name


def npy(folder: Path, **arrays: Any) -> Path:
    if not (folder / "own").exists():
        (folder / "own").mkdir()
        for name, a in (arrays or example_arrays()).items():
            np.save(folder / "own" / name, a)
    return folder / "own"


def records(folder: Path, **arrays: Any) -> str:
    """Write two array_record files; return their glob."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if (folder / "own-0.array_record").exists():
        return str(folder / "own-*.array_record")
    arrays = arrays or example_arrays()
    count = len(arrays["inputs"])
    for part, index in enumerate(np.array_split(np.arange(count), 2)):
        writer = ArrayRecordWriter(str(folder / f"own-{part}.array_record"), "group_size:1")
        for i in index:
            file = io.BytesIO()
            np.savez(file, **{name: a[i] for name, a in arrays.items()})
            writer.write(file.getvalue())
        writer.close()
    return str(folder / "own-*.array_record")
