"""Data sets from files of one's own: arrays, array_record files, and what a Python file makes.

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

from gpipe_jax.data.stream import Batch, Dataset, check_arguments, check_fraction, dataset
from gpipe_jax.errors import DataError

KEYS = ("inputs", "labels")
Decode = Callable[[bytes], Batch]


class Part(NamedTuple):
    """The examples of training, or of evaluation."""

    gather: Callable[[np.ndarray], Batch]  # of indices [B], as they are stored
    count: int
    where: str


class Rules(NamedTuple):
    """What a network reads."""

    tokens: bool = False  # whole numbers, in place of numbers or pixels
    classes: int | None = None  # one more than the largest token and label, if it is known

    def apply(self, where: str, batch: Batch) -> Batch:
        """The batch in the types that are trained on. Raises DataError."""
        self.check(where, batch)
        inputs, labels = (batch[key] for key in KEYS)
        return {"inputs": self._inputs(where, inputs), "labels": labels.astype(np.int32)}

    def check(self, where: str, batch: Batch) -> None:
        """Raise DataError unless labels and tokens are whole numbers that the network knows."""
        used = np.asarray(batch["weights"]) > 0 if "weights" in batch else slice(None)
        inputs, labels = (np.asarray(batch[key])[used] for key in KEYS)
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"labels of {where} have type {labels.dtype}; they must be integers")
        named = {"labels": labels, "inputs": inputs} if self.tokens else {"labels": labels}
        for key, a in named.items():
            self._check_range(f"{key} of {where}", a)

    def _inputs(self, where: str, a: np.ndarray) -> np.ndarray:
        if np.issubdtype(a.dtype, np.integer if self.tokens else np.floating):
            return a.astype(np.int32 if self.tokens else np.float32)
        if a.dtype == np.uint8 and not self.tokens:
            return (a / 127.5 - 1).astype(np.float32)
        rule = "tokens are integers" if self.tokens else "use floats, or pixels in uint8"
        raise DataError(f"inputs of {where} have type {a.dtype}; {rule}")

    def _check_range(self, name: str, a: np.ndarray) -> None:
        largest = 2**31 if self.classes is None else self.classes
        if a.size and not 0 <= a.min() <= a.max() < largest:
            raise DataError(
                f"{name} are from {a.min()} to {a.max()}; the model knows 0 to {largest - 1}"
            )


ANY = Rules()

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
    """Return arrays `inputs` [N, ...] and `labels` [N, ...] of a .npz file or of a folder.

    A .npz file is read at once; in a folder, inputs.npy and labels.npy are memory-mapped, and only
    what a batch needs is read. `test` is the same for evaluation; without it the `test_fraction`
    of the examples is held out, whatever the seed the same ones. Floats become float32, pixels
    (uint8) float32 from -1 to 1, labels and tokens int32. Raises ValueError or OSError, naming
    the argument, and DataError while it is read.
    """
    check_arguments("arrays", batch_size, seed)
    parts = {"train": _arrays("train", Path(train).expanduser())}
    if test is not None:
        parts["test"] = _arrays("test", Path(test).expanduser())
    return _dataset("arrays", batch_size, seed, parts, test_fraction, rules)


def _arrays(role: str, path: Path) -> Part:
    with _reading(role, path):
        found = _mapped(path) if path.is_dir() else _loaded(path)
        missing = [key for key in KEYS if key not in found]
        if missing:
            raise ValueError(
                f"it has no {' and no '.join(missing)}, but {', '.join(sorted(found)) or 'nothing'}"
            )
        lengths = {key: found[key].shape[:1] for key in KEYS}
        if not all(lengths.values()) or len(set(lengths.values())) > 1:
            shapes = ", ".join(f"{key} {list(found[key].shape)}" for key in KEYS)
            raise ValueError(f"the first axis must be the examples, as many of each: {shapes}")
    gather = lambda index_B: {key: found[key][index_B] for key in KEYS}  # noqa: E731
    return Part(gather, len(found["inputs"]), f"{path}")


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    paths = {key: folder / f"{key}.npy" for key in KEYS}
    return {key: np.load(path, mmap_mode="r") for key, path in paths.items()}


def _loaded(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it is no .npz file; of .npy files give the folder")
        return {key: found[key] for key in found.files}


@contextlib.contextmanager
def _reading(role: str, path: object) -> Iterator[None]:
    rule = "give a .npz file or a folder with inputs.npy and labels.npy"
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror} ({error.filename})"
        raise ValueError(f"`{role}` {path} cannot be read: {reason}; {rule}") from error


# --- array_record ---------------------------------------------------------------------------------


def npz_record(record: bytes) -> Batch:
    """One example of a record that holds a .npz file with `inputs` and `labels`."""
    with np.load(io.BytesIO(record), allow_pickle=False) as found:
        return {key: found[key] for key in KEYS}


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
    """Return the examples of array_record files, by path, glob, or a list of these.

    `decode` makes one example of a record's bytes; all are of one shape. The rest is as in
    `arrays`. Files written with `group_size:1` are the quickest to read in any order.
    """
    check_arguments("array_record", batch_size, seed)
    parts = {"train": _records("train", train, decode)}
    if test is not None:
        parts["test"] = _records("test", test, decode)
    return _dataset("array_record", batch_size, seed, parts, test_fraction, rules)


def _records(role: str, source: str | Sequence[str], decode: Decode) -> Part:
    import grain

    patterns = [source] if isinstance(source, str) else list(source)
    paths = [path for pattern in patterns for path in expand(pattern)]
    if not paths:
        raise FileNotFoundError(f"`{role}` {source}: no such file; give the path of one, or a glob")
    try:
        records: Any = grain.sources.ArrayRecordDataSource(paths)
        count = len(records)
    except Exception as error:  # of its C++ reader, whatever it raises
        first = str(error).splitlines()[0]
        raise ValueError(f"`{role}` {source} is not array_record: {first}") from error

    def gather(index_B: np.ndarray) -> Batch:
        made = [_decoded(decode, records[int(i)], f"record {i} of {source}") for i in index_B]
        shapes = {tuple(one[key].shape for key in KEYS) for one in made}
        if len(shapes) > 1:
            raise DataError(f"records of {source} differ in their shapes: {sorted(shapes)[:2]}")
        return {key: np.stack([one[key] for one in made]) for key in KEYS}

    return Part(gather, count, f"{source}")


def _decoded(decode: Decode, record: bytes, name: str) -> Batch:
    try:
        example = decode(record)
        return {key: np.asarray(example[key]) for key in KEYS}
    except Exception as error:  # `decode` may be anybody's
        raise DataError(f"{name} is no example ({type(error).__name__}: {error})") from error


def expand(pattern: str) -> list[str]:
    """The files of a path or of a glob (with ** for any depth), in order."""
    return sorted(p for p in glob.glob(pattern, recursive=True) if not Path(p).is_dir())


# --- both -----------------------------------------------------------------------------------------


def _dataset(
    name: str,
    batch_size: int,
    seed: int,
    parts: dict[str, Part],
    test_fraction: float,
    rules: Rules,
) -> Dataset:
    for role, part in parts.items():
        if not part.count:
            raise ValueError(f"`{role}` {part.where} has no examples")
    if "test" not in parts:
        parts = _split(name, parts["train"], test_fraction)

    def gather(part: Part) -> tuple[Callable[[np.ndarray], Batch], int]:
        return lambda index_B: rules.apply(part.where, part.gather(index_B)), part.count

    return dataset(name, batch_size, seed, gather(parts["train"]), gather(parts["test"]))


def _split(name: str, whole: Part, test_fraction: float) -> dict[str, Part]:
    check_fraction(name, test_fraction)
    held_out = round(whole.count * test_fraction)
    if not 0 < held_out < whole.count:
        raise ValueError(
            f"`test_fraction` {test_fraction} of the {whole.count} examples of {whole.where} is "
            f"{held_out}: neither part may be empty; use another, or give `test`"
        )
    order = np.random.default_rng(0).permutation(whole.count)
    split = {"train": np.sort(order[held_out:]), "test": np.sort(order[:held_out])}
    return {
        role: Part(functools.partial(_some, whole.gather, index), len(index), whole.where)
        for role, index in split.items()
    }


def _some(gather: Callable, index: np.ndarray, index_B: np.ndarray) -> Batch:
    return gather(index[index_B])


# --- Python ---------------------------------------------------------------------------------------
