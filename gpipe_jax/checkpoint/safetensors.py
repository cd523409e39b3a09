"""Write safetensors files as a stream, and read them: eight bytes, a JSON header, the arrays.

The format is that of https://github.com/huggingface/safetensors. Its own numpy writer needs all
arrays in memory at once; here a file may be larger than the host's memory.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

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
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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


def read(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a whole file, by name, as read-only views of it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)

    def view(dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        start = 8 + length + data_offsets[0]
        return np.frombuffer(data, DTYPES[dtype], size, start).reshape(shape)

    return {name: view(**entry) for name, entry in header.items()}
