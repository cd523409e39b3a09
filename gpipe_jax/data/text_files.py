"""Read text files as a data set of bytes."""

import errno
import glob
import sysconfig
from pathlib import Path

import numpy as np

from gpipe_jax.data.files import expand
from gpipe_jax.data.stream import Batch, Dataset, check_arguments, dataset
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths
from gpipe_jax.utils.checks import check_fraction


def text(
    source: str | Path, batch_size: int, length: int, seed: int, *, test_fraction: float = 0.1
) -> Dataset:
    """Read a text for next-byte prediction.

    A training example starts at any byte. The last `test_fraction` of the bytes is held out, in one
    piece: windows overlap, so training would have seen windows held out at random. The held-out
    piece does not depend on the seed or the length. Its windows predict each byte once, the first
    from the last training byte; an incomplete window at the end is dropped.

    Args:
        source: One of

            - "topics": the help texts of `pydoc_data.topics`, 0.5 MB, in the order of their keys;
            - "stdlib": the .py files of the standard library without tests and site-packages,
              13 MB, in the order of their paths. Both differ between Python versions: compare
              losses on one version only;
            - the path of a file, or a glob (books/**/*.txt); its files are read as one, in order.
        batch_size: Examples of a batch (N of the pipeline).
        length: The bytes T of an example.
        seed: Determines the training examples.
        test_fraction: The fraction of the bytes to hold out. Default: 0.1.

    Returns:
        The data set; inputs: int32 [B, T] of bytes; labels: int32 [B, T], the byte after each.

    Raises:
        OSError: A file cannot be read.
        ValueError: The text is too short, or an argument is out of range.

    Example::

        dataset = gpipe.data.text("books/*.txt", batch_size=32, length=256, seed=0)
    """
    check_arguments(f"text {source}", batch_size, seed)
    check_fraction("test_fraction", test_fraction, zero=False)
    data = _read(source)
    held_out = round(len(data) * test_fraction)
    split = len(data) - held_out
    longest = min(split - 1, held_out)
    if not 1 <= length <= longest:
        raise ValueError(
            f"length {length} does not fit text {source} of {len(data)} bytes, {split} for "
            f"training and {held_out} held out: use a length of 1 to {longest}"
            if longest
            else f"text {source} of {len(data)} bytes is too short: training needs 2 bytes and the "
            f"held-out fraction {test_fraction} 1; use a longer text"
        )

    def gather(starts_B: np.ndarray) -> Batch:
        windows = data[starts_B[:, None] + np.arange(length + 1)].astype(np.int32)
        return {"inputs": windows[:, :-1], "labels": windows[:, 1:]}

    def gather_test(window_B: np.ndarray) -> Batch:
        return gather(split - 1 + window_B * length)

    train_split = gather, split - length
    test_split = gather_test, held_out // length
    return dataset(f"text {source}", batch_size, seed, train_split, test_split)


def _read(source: str | Path) -> np.ndarray:
    """Return the bytes of a source; those of a single file are memory-mapped."""
    if source == "topics":
        from pydoc_data.topics import topics

        return _bytes("".join(topics[key] for key in sorted(topics)).encode())
    if source == "stdlib":
        return _bytes(b"".join(path.read_bytes() for path in _stdlib_files()))
    path = paths.local("source", source)
    try:
        if glob.has_magic(str(path)) and not path.exists():
            files = expand(str(path))
            if not files:
                raise FileNotFoundError(errno.ENOENT, "no file matches it")
            data = _bytes(b"".join(Path(file).read_bytes() for file in files))
        elif path.stat().st_size:
            data = np.memmap(path, np.uint8, mode="r")
        else:
            data = _bytes(path.read_bytes())
    except OSError as error:
        raise OSError(
            error.errno,
            f"`source`: cannot read text file {source}: {error.strerror}; give the path of a "
            "readable file, a glob, 'topics' or 'stdlib'",
        ) from error
    if not len(data):
        raise ArgumentError(
            "source", f"`source`: text file {source} is empty: give a file with text"
        )
    return data


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
