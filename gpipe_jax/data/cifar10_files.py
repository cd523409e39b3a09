"""CIFAR-10 from the files it is handed out in, and the random changes of training images.

The formats are described on the page of the data set, `PAGE`. Letters: N images of a part, B images
of a batch, S pixels each way, C channels.
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

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
FOLDER_VARIABLE = "GPIPE_JAX_DATA"

_MEAN = np.array([0.4914, 0.4822, 0.4465])  # of the training images' channels, from 0 to 1
_DEVIATION = np.array([0.2470, 0.2435, 0.2616])
_PER_FILE = 10_000  # five files of training images, one of test images
_ROW = 3 * 32 * 32  # bytes of an image: a plane each of red, green and blue


class Images(NamedTuple):
    """A part of a data set."""

    pixels: np.ndarray  # [N, 32, 32, 3] uint8
    labels: np.ndarray  # [N] int32


def normalised(pixels: np.ndarray) -> np.ndarray:
    """CIFAR-10's pixels as float32, of mean 0 and deviation 1 in each channel of all training."""
    scale, shift = 1 / (255 * _DEVIATION), -_MEAN / _DEVIATION
    return pixels * scale.astype(np.float32) + shift.astype(np.float32)


# --- reading --------------------------------------------------------------------------------------


def read_cifar10(folder: str | Path | None = None) -> tuple[Images, Images]:
    """The training and the test images in `folder`, or in a folder cifar10 within it.

    There must be the python or the binary version, as a .tar.gz or unpacked, or all images as JPEG
    in `cifar10_jpeg_packed.npz` (needs pillow). The default is the folder that the environment
    variable GPIPE_JAX_DATA names. Archives are not unpacked to disk.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    remedy = f"download the python or binary version from {PAGE} and put the .tar.gz there"
    if not named:
        raise FileNotFoundError(
            f"`folder` of cifar10 is not given and {FOLDER_VARIABLE} is not set: give a folder of "
            f"its files; {remedy}"
        )
    root = Path(named).expanduser()
    for place in (root, root / "cifar10"):
        for name, read in _READERS.items():
            if (place / name).exists():
                return read(place / name)
    problem = f"{root} has none of {', '.join(_READERS)}" if root.is_dir() else f"no folder {root}"
    raise FileNotFoundError(f"cannot find CIFAR-10: {problem}; {remedy}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of tarfile, gzip, pickle, zipfile, pillow, or ours
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
    """Both parts from six files; `take` gets their contents from a folder or an archive."""
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
    found = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if name in names else None
            if content is not None:
                found[name] = content.read()
    return found


def _checked(name: str, part: Images, count: int) -> Images:
    wanted = (count, 32, 32, 3), (count,)
    have = part.pixels.shape, part.labels.shape
    if have != wanted:
        raise ValueError(f"pixels and labels of {name} are {have}, not {wanted}")
    if part.labels.min() < 0 or part.labels.max() > 9:
        raise ValueError(f"labels of {name} are {part.labels.min()} to {part.labels.max()}")
    return part


def _from_rows(rows: np.ndarray, labels: Any) -> Images:
    """Images of rows [N, 3072] of uint8."""
    pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(np.ascontiguousarray(pixels), np.asarray(labels, np.int32))


def _decode_binary(content: bytes) -> Images:
    """Records of 1 + 3072 bytes: label, pixels."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _ROW)
    return _from_rows(records[:, 1:], records[:, 0])


def _decode_pickle(content: bytes) -> Images:
    """A dict of Python 2 with an array "data" [N, 3072] and a list "labels"."""
    record = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    _, shape, _, is_fortran, data = record[b"data"].state
    rows = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    return _from_rows(rows, record[b"labels"])


class _Array:
    """Stands in for numpy's array and type in a pickle, and only keeps what it is told."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, bytes and arrays; a pickle can name nothing else to be run."""

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

    def part(name: str, count: int) -> Images:
        jpegs = np.split(arrays[f"{name}_jpeg"], arrays[f"{name}_offset"][1:-1])
        labels = arrays[f"{name}_label"].astype(np.int32)
        return _checked(name, Images(np.stack([decode(jpeg) for jpeg in jpegs]), labels), count)

    with _reading(path), np.load(path) as arrays:
        return part("train", 5 * _PER_FILE), part("test", _PER_FILE)


# What may hold the images, by name: reader(path) -> (training, test images).
_READERS: dict[str, Callable[[Path], tuple[Images, Images]]] = {
    name: functools.partial(_read_batches, take, decode, ending)
    for name, take, decode, ending in [
        ("cifar-10-batches-py", _from_folder, _decode_pickle, ""),
        ("cifar-10-batches-bin", _from_folder, _decode_binary, ".bin"),
        ("cifar-10-python.tar.gz", _from_archive, _decode_pickle, ""),
        ("cifar-10-binary.tar.gz", _from_archive, _decode_binary, ".bin"),
    ]
} | {"cifar10_jpeg_packed.npz": _read_packed}


# --- random changes -------------------------------------------------------------------------------
