"""Read text files as a data set of bytes."""

import errno
import glob
import sysconfig
from pathlib import Path

import numpy as np

from gpipe_jax.data.files import expand
from gpipe_jax.data.stream import Batch, Dataset, check_arguments, check_fraction, dataset


def text(
    source: str | Path, batch_size: int, length: int, seed: int, *, test_fraction: float = 0.1
) -> Dataset:
    """Return next-byte prediction on a text.

    inputs: int32 [B, T] of bytes; labels: int32 [B, T], the byte after each. `source` is one of

    - "topics": the help texts of `pydoc_data.topics`, 0.5 MB, in the order of their keys;
    - "stdlib": the standard library's .py files, without tests and site-packages, 13 MB, in the
      order of their paths. Both differ between Python versions: compare losses on one only;
    - the path of a file, or a glob (books/**/*.txt) of files, which are read as one, in order.

    The last `test_fraction` of the bytes is held out, in one piece: windows overlap, so windows
    held out at random would have been read in training. It depends on neither seed nor length. It
    is cut into windows that predict each byte once, the very first from the last training byte;
    what is left of a window at the end is dropped. A training example starts at any byte.
    """
    check_arguments(f"text {source}", batch_size, seed)
    check_fraction(f"text {source}", test_fraction)
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

    return dataset(
        f"text {source}",
        batch_size,
        seed,
        (gather, split - length),
        (lambda window_B: gather(split - 1 + window_B * length), held_out // length),
    )


def _read(source: str | Path) -> np.ndarray:
    """Its bytes; those of a single file are mapped, and read where they are needed."""
    if source == "topics":
        from pydoc_data.topics import topics

        return _bytes("".join(topics[key] for key in sorted(topics)).encode())
    if source == "stdlib":
        return _bytes(b"".join(path.read_bytes() for path in _stdlib_files()))
    path = Path(source).expanduser()
    try:
        if glob.has_magic(str(path)) and not path.exists():
            paths = expand(str(path))
            if not paths:
                raise FileNotFoundError(errno.ENOENT, "no file matches it")
            data = _bytes(b"".join(Path(each).read_bytes() for each in paths))
        elif path.stat().st_size:
            data = np.memmap(path, np.uint8, mode="r")
        else:
            data = _bytes(path.read_bytes())
    except OSError as error:
        raise OSError(
            error.errno,
            f"`source`: cannot read text file {source}: {error.strerror}; give the path of a "
            "readable file, a glob of such, 'topics' or 'stdlib'",
        ) from error
    if not len(data):
        raise ValueError(f"`source`: text file {source} is empty: give a file with text")
    return data


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
