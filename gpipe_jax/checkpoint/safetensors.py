"""Write safetensors files as a stream, and read them: eight bytes, a JSON header, the arrays.

The format is that of https://github.com/huggingface/safetensors. Its own numpy writer needs all
arrays in memory at once; here a file may be larger than the host's memory.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
import pydantic

from gpipe_jax.checkpoint.reading import parse

Shape = tuple[np.dtype, tuple[int, ...]]

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"  # the key of texts in the header


class ChecksummedFile:
    """Wrap a file that is being written; count its bytes and their CRC-32."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data: Any) -> None:
        """Write bytes."""
        self.file.write(data)
        self.size, self.crc32 = self.size + len(data), zlib.crc32(data, self.crc32)

    def sync(self) -> None:
        """Flush everything to the disk, if the file is on one."""
        self.file.flush()
        try:
            descriptor = self.file.fileno()
        except (OSError, AttributeError):
            return  # a remote file
        os.fsync(descriptor)


def write(
    file: IO[bytes] | ChecksummedFile,
    shapes: Mapping[str, Shape],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `arrays`, which come in the order of `shapes` ({name: (dtype, shape)})."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in shapes.items():
        if dtype not in _NAMES:
            raise ValueError(f"array {name} has type {dtype}, which safetensors does not support")
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays:
        if array.size:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_all(file: IO[bytes] | ChecksummedFile, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name; all are in memory."""
    write(file, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.values())


class _Entry(pydantic.BaseModel):
    """Describe an array in the header of a file."""

    model_config = pydantic.ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[pydantic.NonNegativeInt, ...]
    data_offsets: tuple[pydantic.NonNegativeInt, pydantic.NonNegativeInt]

    def problem(self, expected_start: int) -> str | None:
        """Return why it does not describe an array that begins there; None if it does."""
        if self.dtype not in DTYPES:
            return f"has the unknown type {self.dtype!r}"
        start, end = self.data_offsets
        size = np.dtype(DTYPES[self.dtype]).itemsize * math.prod(self.shape)
        if (start, end) == (expected_start, expected_start + size):
            return None
        return f"is at bytes {start} to {end}, not {expected_start} to {expected_start + size}"


_HEADER = pydantic.TypeAdapter(dict[str, _Entry | dict[str, str]])


def read(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a whole file, by name, as read-only views of it.

    Raises:
        ValueError: The file is not one of this format, or its arrays overlap, have gaps between
            them, or do not fill it.
    """
    first = 8 + int.from_bytes(data[:8], "little")
    if not 8 < first <= len(data):
        raise ValueError(f"the header ends at byte {first} of {len(data)}")
    header = parse(data[8:first], _HEADER)
    entries = {n: entry for n, entry in header.items() if isinstance(entry, _Entry)}
    if unknown := header.keys() - entries.keys() - {_METADATA}:
        raise ValueError(f"the header describes {min(unknown)} by texts only")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if problem := entry.problem(end):
            raise ValueError(f"{name} {problem}")
        end = entry.data_offsets[1]
    if first + end != len(data):
        raise ValueError(f"the arrays end at byte {first + end} of {len(data)}")

    def view(entry: _Entry) -> np.ndarray:
        count, start = math.prod(entry.shape), first + entry.data_offsets[0]
        return np.frombuffer(data, DTYPES[entry.dtype], count, start).reshape(entry.shape)

    return {name: view(entry) for name, entry in entries.items()}
