"""Read the user's own files as data sets: arrays, and array_record files.

Letters: N examples of a file, B examples of a batch.
"""

import contextlib
import functools
import glob
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpipe_jax.data.rules import ANY, KEYS, Rules
from gpipe_jax.data.stream import Batch, Dataset, check_arguments, dataset
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.utils import paths
from gpipe_jax.utils.checks import check_fraction

Decode = Callable[[bytes], Batch]


class Split(NamedTuple):
    """Hold the examples of training, or of evaluation."""

    gather: Callable[[np.ndarray], Batch]  # examples by indices [B], as they are stored
    count: int
    source: str  # for messages


# --- arrays ---------------------------------------------------------------------------------------


def arrays(
    train: str | Path,
    batch_size: int,
    seed: int,
    *,
    test: str | Path | None = None,
    test_fraction: float = 0.1,
    rules: Rules = ANY,
) -> Dataset:
    """Read arrays `inputs` [N, ...] and `labels` [N, ...] from a .npz file or a folder.

    A .npz file is read at once. In a folder, inputs.npy and labels.npy are memory-mapped, and a
    batch reads only what it needs. Floats become float32, pixels (uint8) float32 from -1 to 1,
    labels and tokens int32.

    Args:
        train: The file or folder of the training examples.
        batch_size: Examples of a batch (N of the pipeline).
        seed: Determines the order of the training examples.
        test: The file or folder of the held-out examples. Default: None, which holds out
            `test_fraction` of the training examples.
        test_fraction: The fraction of the training examples to hold out; it does not depend on
            the seed. Default: 0.1.
        rules: What the network accepts. Default: anything.

    Returns:
        The data set. Its iterators raise DataError if an example breaks the rules.

    Raises:
        ValueError: A file cannot be read, or an argument does not fit the data.

    Example::

        dataset = gpipe.data.arrays("digits.npz", batch_size=64, seed=0)
        first = next(dataset.train(0))  # {"inputs": [64, ...], "labels": [64, ...]}
    """
    check_arguments("arrays", batch_size, seed)
    splits = {"train": _arrays("train", paths.local("train", train))}
    if test is not None:
        splits["test"] = _arrays("test", paths.local("test", test))
    return _dataset("arrays", batch_size, seed, splits, test_fraction, rules)


def _arrays(role: str, path: Path) -> Split:
    with _reading(role, path):
        stored = _map_folder(path) if path.is_dir() else _load_npz(path)
        missing = [key for key in KEYS if key not in stored]
        if missing:
            names = ", ".join(sorted(stored)) or "nothing"
            raise ValueError(f"it has no {' and no '.join(missing)}, but {names}")
        lengths = {key: stored[key].shape[:1] for key in KEYS}
        if not all(lengths.values()) or len(set(lengths.values())) > 1:
            shapes = ", ".join(f"{key} {list(stored[key].shape)}" for key in KEYS)
            raise ValueError(f"the first axis must be the examples, equally many: {shapes}")

    def gather(index_B: np.ndarray) -> Batch:
        return {key: stored[key][index_B] for key in KEYS}

    return Split(gather, len(stored["inputs"]), str(path))


def _map_folder(folder: Path) -> dict[str, np.ndarray]:
    paths = {key: folder / f"{key}.npy" for key in KEYS}
    return {key: np.load(path, mmap_mode="r") for key, path in paths.items()}


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it is not a .npz file; for .npy files give their folder")
        return {key: stored[key] for key in stored.files}


@contextlib.contextmanager
def _reading(role: str, path: object) -> Iterator[None]:
    """Raise ValueError with the argument, the path and the remedy for an error inside."""
    rule = "give a .npz file or a folder with inputs.npy and labels.npy"
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror} ({error.filename})"
        raise ArgumentError(role, f"`{role}` {path} cannot be read: {reason}; {rule}") from error


# --- array_record ---------------------------------------------------------------------------------


def npz_record(record: bytes) -> Batch:
    """Decode one example from a record that is a .npz file with `inputs` and `labels`."""
    with np.load(io.BytesIO(record), allow_pickle=False) as stored:
        return {key: stored[key] for key in KEYS}


def array_record(
    train: str | Sequence[str],
    batch_size: int,
    seed: int,
    *,
    test: str | Sequence[str] | None = None,
    test_fraction: float = 0.1,
    rules: Rules = ANY,
    decode: Decode = npz_record,
) -> Dataset:
    """Read the examples of array_record files.

    Files written with `group_size:1` are the fastest to read in any order.

    Args:
        train: The files of the training examples: a path, a glob, or a list of these.
        batch_size: Examples of a batch (N of the pipeline).
        seed: Determines the order of the training examples.
        test: The files of the held-out examples. Default: None, which holds out
            `test_fraction` of the training examples.
        test_fraction: The fraction of the training examples to hold out; it does not depend on
            the seed. Default: 0.1.
        rules: What the network accepts. Default: anything.
        decode: Makes one example (`inputs` and `labels`) from the bytes of a record; all examples
            have the same shapes. Default: a record is a .npz file.

    Returns:
        The data set. Its iterators raise DataError if a record is not an example, or breaks the
        rules.

    Raises:
        ValueError: There is no such file, it is not array_record, or an argument does not fit the
            data.

    Example::

        dataset = gpipe.data.array_record("train-*.array_record", batch_size=64, seed=0)
    """
    check_arguments("array_record", batch_size, seed)
    splits = {"train": _records("train", train, decode)}
    if test is not None:
        splits["test"] = _records("test", test, decode)
    return _dataset("array_record", batch_size, seed, splits, test_fraction, rules)


def _records(role: str, source: str | Sequence[str], decode: Decode) -> Split:
    import grain

    patterns = [source] if isinstance(source, str) else list(source)
    files = [path for pattern in patterns for path in expand(str(paths.local(role, pattern)))]
    if not files:
        raise ArgumentError(role, f"`{role}` {source}: no such file; give a path or a glob")
    try:
        records: Any = grain.sources.ArrayRecordDataSource(files)
        count = len(records)
    except Exception as error:  # its C++ reader may raise anything
        first = str(error).splitlines()[0]
        raise ArgumentError(role, f"`{role}` {source} is not array_record: {first}") from error

    def gather(index_B: np.ndarray) -> Batch:
        examples = [_decoded(decode, records[int(i)], f"record {i} of {source}") for i in index_B]
        shapes = {tuple(example[key].shape for key in KEYS) for example in examples}
        if len(shapes) > 1:
            raise DataError(f"records of {source} differ in their shapes: {sorted(shapes)[:2]}")
        return {key: np.stack([example[key] for example in examples]) for key in KEYS}

    return Split(gather, count, str(source))


def _decoded(decode: Decode, record: bytes, name: str) -> Batch:
    try:
        example = decode(record)
        return {key: np.asarray(example[key]) for key in KEYS}
    except Exception as error:  # the user's `decode` may raise anything
        raise DataError(f"{name} is not an example ({type(error).__name__}: {error})") from error


def expand(pattern: str) -> list[str]:
    """Return the files of a path or a glob (with ** for any depth), sorted."""
    return sorted(p for p in glob.glob(pattern, recursive=True) if not Path(p).is_dir())


# --- both kinds of file ---------------------------------------------------------------------------


def _dataset(
    name: str,
    batch_size: int,
    seed: int,
    splits: dict[str, Split],
    test_fraction: float,
    rules: Rules,
) -> Dataset:
    for role, split in splits.items():
        if not split.count:
            raise ArgumentError(role, f"`{role}` {split.source} has no examples")
    if "test" not in splits:
        splits = _hold_out(name, splits["train"], test_fraction)

    def gather(role: str, index_B: np.ndarray) -> Batch:
        split = splits[role]
        return rules.apply(split.source, split.gather(index_B))

    train, test = (
        (functools.partial(gather, role), splits[role].count) for role in ("train", "test")
    )
    return dataset(name, batch_size, seed, train, test)


def _hold_out(name: str, whole: Split, test_fraction: float) -> dict[str, Split]:
    """Split the examples in two; which ones are held out does not depend on the seed."""
    check_fraction("test_fraction", test_fraction, zero=False)
    held_out = round(whole.count * test_fraction)
    if not 0 < held_out < whole.count:
        raise ArgumentError(
            "test_fraction",
            f"`test_fraction` {test_fraction} of the {whole.count} examples of {whole.source} is "
            f"{held_out}: neither split may be empty; use another, or give `test`",
        )
    order = np.random.default_rng(0).permutation(whole.count)
    chosen = {"train": np.sort(order[held_out:]), "test": np.sort(order[:held_out])}
    return {
        role: Split(functools.partial(_gather_of, whole.gather, index), len(index), whole.source)
        for role, index in chosen.items()
    }


def _gather_of(gather: Callable, index: np.ndarray, index_B: np.ndarray) -> Batch:
    """Gather from a subset, whose examples have the indices `index` in the whole."""
    return gather(index[index_B])
