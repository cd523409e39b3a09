"""Read CIFAR-10 from the files in which it is published.

The formats are described on the page of the data set, `PAGE`. Letters: N images of a split.
"""

import functools
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gpipe_jax.utils import paths
from gpipe_jax.utils.choices import FOLDER_VARIABLE

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_MEAN = np.array([0.4914, 0.4822, 0.4465])  # per channel of the training images, from 0 to 1
_DEVIATION = np.array([0.2470, 0.2435, 0.2616])
_PER_FILE = 10_000  # images; five files for training, one for testing
_ROW = 3 * 32 * 32  # bytes of an image: one plane each of red, green and blue


class Images(NamedTuple):
    """Hold the images of one split: training or test."""

    pixels: np.ndarray  # [N, 32, 32, 3] uint8
    labels: np.ndarray  # [N] int32


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as float32: over all training images, each channel has mean 0, deviation 1."""
    scale, shift = 1 / (255 * _DEVIATION), -_MEAN / _DEVIATION
    return pixels * scale.astype(np.float32) + shift.astype(np.float32)


# --- reading --------------------------------------------------------------------------------------


def read_cifar10(folder: str | Path | None = None) -> tuple[Images, Images]:
    """Return the training and the test images in `folder`, or in the folder cifar10 inside it.

    The folder has the python or the binary version, as a .tar.gz or unpacked, or all images as JPEG
    in `cifar10_jpeg_packed.npz` (needs pillow). The default is the folder of the environment
    variable GPIPE_JAX_DATA. Archives are not unpacked to disk.
    """
    given = folder or os.environ.get(FOLDER_VARIABLE)
    remedy = f"download the python or binary version from {PAGE} and put the .tar.gz there"
    if not given:
        raise FileNotFoundError(
            f"`folder` of cifar10 is not given and {FOLDER_VARIABLE} is not set: give a folder of "
            f"its files; {remedy}"
        )
    root = paths.local("folder", given)
    for path in (root, root / "cifar10"):
        for name, read in _READERS.items():
            if (path / name).exists():
                return read(path / name)
    problem = f"{root} has none of {', '.join(_READERS)}" if root.is_dir() else f"no folder {root}"
    raise FileNotFoundError(f"cannot find CIFAR-10: {problem}; {remedy}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise ValueError with the path and the remedy for any error inside."""
    try:
        yield
    except Exception as error:  # tarfile, gzip, pickle, zipfile and pillow have their own
        raise ValueError(
            f"{path} cannot be read as CIFAR-10 ({type(error).__name__}: {error}); download it "
            f"again from {PAGE}"
        ) from error


def _read_batches(
    take: Callable[[Path, Collection[str]], dict[str, bytes]],
    decode: Callable[[bytes], Images],
    ending: str,
    path: Path,
) -> tuple[Images, Images]:
    """Read both splits from six files; `take` gets their contents from a folder or an archive."""
    names = [f"data_batch_{i}{ending}" for i in range(1, 6)] + [f"test_batch{ending}"]
    with _reading(path):
        contents = take(path, names)
        for name in names:
            if name not in contents:
                raise ValueError(f"there is no {name}")
        *train, test = [_checked(name, decode(contents[name]), _PER_FILE) for name in names]
        return Images(*map(np.concatenate, zip(*train, strict=True))), test


def _from_folder(path: Path, names: Collection[str]) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in names if (path / name).exists()}


def _from_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if name in names else None
            if content is not None:
                contents[name] = content.read()
    return contents


def _checked(name: str, images: Images, count: int) -> Images:
    """Raise ValueError unless there are `count` images of 32x32 pixels and ten classes."""
    expected = (count, 32, 32, 3), (count,)
    shapes = images.pixels.shape, images.labels.shape
    if shapes != expected:
        raise ValueError(f"pixels and labels of {name} are {shapes}, not {expected}")
    lowest, highest = images.labels.min(), images.labels.max()
    if lowest < 0 or highest > 9:
        raise ValueError(f"labels of {name} are {lowest} to {highest}")
    return images


def _from_rows(rows: np.ndarray, labels: Any) -> Images:
    """Return the images of rows [N, 3072] of uint8."""
    pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), np.asarray(labels, np.int32))


def _decode_binary(content: bytes) -> Images:
    """Decode records of 1 + 3072 bytes: label, pixels."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _ROW)
    return _from_rows(records[:, 1:], records[:, 0])


def _decode_pickle(content: bytes) -> Images:
    """Decode a dict of Python 2 with an array "data" [N, 3072] and a list "labels"."""
    record = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    _, shape, _, is_fortran, data = record[b"data"].state
    rows = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    return _from_rows(rows, record[b"labels"])


class _Array:
    """Replace numpy's array and type in a pickle, and only store their state."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Read dicts, lists, numbers, bytes and arrays; refuse anything else a pickle may execute."""

    def find_class(self, module: str, name: str) -> type:
        known = {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # since numpy 2
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no CIFAR-10 file does"
            )
        return _Array


def _read_packed(path: Path) -> tuple[Images, Images]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{path} holds JPEG images: run pip install pillow") from error

    def decode(jpeg: np.ndarray) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(jpeg.tobytes()), formats=["JPEG"]).convert("RGB"))

    def split(name: str, count: int) -> Images:
        jpegs = np.split(arrays[f"{name}_jpeg"], arrays[f"{name}_offset"][1:-1])
        labels = arrays[f"{name}_label"].astype(np.int32)
        return _checked(name, Images(np.stack([decode(jpeg) for jpeg in jpegs]), labels), count)

    with _reading(path), np.load(path) as arrays:
        return split("train", 5 * _PER_FILE), split("test", _PER_FILE)


# Readers by the name of the file or folder: reader(path) -> (training, test images).
_READERS: dict[str, Callable[[Path], tuple[Images, Images]]] = {
    name: functools.partial(_read_batches, take, decode, ending)
    for name, take, decode, ending in [
        ("cifar-10-batches-py", _from_folder, _decode_pickle, ""),
        ("cifar-10-batches-bin", _from_folder, _decode_binary, ".bin"),
        ("cifar-10-python.tar.gz", _from_archive, _decode_pickle, ""),
        ("cifar-10-binary.tar.gz", _from_archive, _decode_binary, ".bin"),
    ]
} | {"cifar10_jpeg_packed.npz": _read_packed}
