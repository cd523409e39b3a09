"""Make seeded streams of batches that can start at any step, and held-out examples.

Training is endless. The batch of step s depends only on (seed, s). So a resumed run continues with
`train(s)`, which reads nothing before step s. A process that needs only some positions of every
batch calls `train(s, rows)`, and reads no others.

Each epoch is its own seeded permutation. Epochs follow each other without a gap: a batch may hold
the end of one and the start of the next. All batches have the same size, and no example is left
out:

    epoch     0            1            2
    order     3 0 4 1 2 5  4 0 5 1 3 2  0 3 ...      6 examples
    batches  [3 0 4 1][2 5 4 0] [5 1 3 2] [0 3 ...   of 4
    step      0        1         2         3

Letters: B batch_size.
"""

import functools
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.utils.checks import check_count

Batch = dict[str, Any]  # "inputs", "labels", perhaps "extras": the first axis is the example


@dataclass(frozen=True)
class Dataset:
    """Hold a training stream and the held-out examples.

    Args:
        name: A name for messages.
        train: `train(step, rows=None)` yields the batches from `step` on, without end. `rows` are
            the positions [<= B] of each batch to read; None reads all.
        test: `test()` yields each held-out example once, in order; the last batch may be smaller.
        train_examples: The number of training examples. Default: None, not known.
        test_examples: The number of held-out examples. Default: None, not known.

    Example::

        dataset = gpipe.data.digits(batch_size=64, seed=0)
        for step, batch in zip(range(100), dataset.train(0)):
            ...
    """

    name: str
    train: Callable[..., Iterator[Batch]]
    test: Callable[[], Iterator[Batch]]
    train_examples: int | None = None
    test_examples: int | None = None


def fingerprint(dataset: Dataset, first: Batch) -> dict[str, int | None]:
    """Return what identifies a data set when a run resumes; `first` is its first batch.

    It has a checksum of labels, which are as they were read. Computed inputs may differ between
    machines.
    """
    return {
        "train_examples": dataset.train_examples,
        "test_examples": dataset.test_examples,
        "first_labels_crc32": zlib.crc32(np.ascontiguousarray(first["labels"]).tobytes()),
    }


def sketch(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return a float32 number for each example of a batch, and how far rounding may change it.

    Different inputs have different numbers. A checksum would not do, because computed inputs may
    differ by rounding between machines.
    """
    arrays = {name: a for name, a in batch.items() if name != "weights"}
    leaves = [np.asarray(a) for _, a in sorted(_by_name(arrays).items())]
    numbers = np.zeros((2, len(leaves[0])))
    rng = np.random.default_rng(0)
    for a in leaves:
        rows = a.reshape(len(a), -1)
        factors = rng.uniform(1, 2, rows.shape[1])
        for i, row in enumerate(rows):  # a whole batch as float64 would take much memory
            row = np.nan_to_num(row.astype(np.float64), posinf=1e30, neginf=-1e30)
            numbers[:, i] += factors @ row, factors @ np.abs(row)
    value, size = np.clip(numbers, -1e38, 1e38)
    return value.astype(np.float32), (1e-5 * size).astype(np.float32)


def dataset(
    name: str,
    batch_size: int,
    seed: int,
    train_split: tuple[Callable[[np.ndarray], Batch], int],
    test_split: tuple[Callable[[np.ndarray], Batch], int],
    augment: "Callable[[Batch, Draws], Batch] | None" = None,
) -> Dataset:
    """Make a data set from functions that look examples up by index.

    Args:
        name: A name for messages.
        batch_size: Examples of a batch (N of the pipeline).
        seed: Determines the order of the training examples and the random numbers of `augment`.
        train_split: `(gather, count)`: `gather(indices)` returns the examples of int indices [B]
            below `count`, as a batch with `inputs`, `labels` and perhaps `extras`.
        test_split: The same for the held-out examples.
        augment: `augment(batch, draws)` changes a training batch at random; `draws` has its random
            numbers. None leaves batches as they are. Default: None.

    Returns:
        The data set.

    Raises:
        ValueError: `batch_size` exceeds the number of training examples.

    Example::

        def gather(index):
            return {"inputs": images[index], "labels": labels[index]}

        dataset = gpipe.data.dataset("mine", 64, 0, (gather, 50_000), (gather_test, 10_000))
    """
    (gather_train, train_examples), (gather_test, test_examples) = train_split, test_split
    batch_size, seed = check_count("batch_size", batch_size), operator.index(seed)
    if batch_size > train_examples:
        raise ArgumentError(
            "batch_size",
            f"`batch_size` {batch_size} is above the {train_examples} training examples of {name}: "
            f"use {train_examples} or fewer",
        )

    def train(start_step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: steps count from 0")
        order = _order(train_examples, batch_size, seed)
        steps = order.map(lambda index_B: gather_train(index_B if rows is None else index_B[rows]))
        if augment is not None:
            # The generator of a step depends only on (seed, step).
            steps = steps.random_map(functools.partial(_augment, augment, batch_size, rows))
        return _read_ahead(steps.slice(slice(start_step, None)))

    def test() -> Iterator[Batch]:
        for start in range(0, test_examples, batch_size):
            yield gather_test(np.arange(start, min(start + batch_size, test_examples)))

    return Dataset(name, train, test, train_examples, test_examples)


def _augment(
    augment: "Callable[[Batch, Draws], Batch]",
    batch_size: int,
    rows: np.ndarray | None,
    batch: Batch,
    rng: np.random.Generator,
) -> Batch:
    return augment(batch, Draws(rng, batch_size, rows))


def _order(examples: int, batch_size: int, seed: int) -> Any:
    import grain  # takes 1.5 s

    # Batch the indices before the lookup: one numpy gather per batch, not one per example.
    order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
    return order.batch(batch_size, drop_remainder=True)


def _read_ahead(steps: Any) -> Iterator[Batch]:
    import grain

    # One thread reads ahead while the devices are busy; grain's default is 16, and 500 batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    try:
        yield from steps.to_iter_dataset(options)
    except DataError as error:  # grain appends lines about itself
        raise DataError(str(error).partition("\n")[0]) from error


class Draws:
    """Draw random numbers for the rows of a batch that are read, as if for the whole batch.

    So an example changes in the same way in each process that may read it.
    """

    def __init__(
        self, rng: np.random.Generator, batch_size: int, rows: np.ndarray | None = None
    ) -> None:
        self._rng, self._count = rng, batch_size
        self._rows = slice(None) if rows is None else rows

    def integers(self, low: int, high: int, each: int) -> np.ndarray:
        """Draw `each` whole numbers for each example, low <= number < high: [rows, each]."""
        return self._rng.integers(low, high, (self._count, each))[self._rows]

    def random(self) -> np.ndarray:
        """Draw a number in [0, 1) for each example: [rows]."""
        return self._rng.random(self._count)[self._rows]


def iterable(
    name: str,
    batches: Callable[[int], Iterable[Batch]],
    test: Callable[[], Iterable[Batch]],
) -> Dataset:
    """Make a data set from functions that iterate over batches.

    Args:
        name: A name for messages.
        batches: `batches(step)` yields the training batches from that step on, without end, and the
            same ones in every call. A batch is a dictionary with `inputs`, `labels` and perhaps
            `extras`. The first axis of all is the example, and all have the same shapes.
        test: `test()` yields each held-out example once, in batches of at most that size.

    Returns:
        The data set. Its iterators raise DataError if a batch is something else, or the training
        batches end.

    Example::

        def batches(step):
            for s in itertools.count(step):
                yield {"inputs": load_inputs(s), "labels": load_labels(s)}

        dataset = gpipe.data.iterable("mine", batches, lambda: [])
    """

    def train(start_step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        for batch in _checked(name, batches(start_step), same=True):
            yield batch if rows is None else _take(batch, rows)
        raise DataError(
            f"the training batches of {name} from step {start_step} on ended; `batches` must "
            f"yield them without end: begin the next epoch"
        )

    return Dataset(name, train, lambda: _checked(name, test(), same=False))


def _checked(name: str, batches: Iterable[Batch], same: bool) -> Iterator[Batch]:
    """Yield batches, checked: of the same shapes, or of any number of the same examples."""
    first = None
    for batch in batches:
        if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch):
            got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"a batch of {name} is {got}; give a dict of inputs and labels")
        shapes = {name: np.shape(a) for name, a in _by_name(batch).items()}
        if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
            raise DataError(
                f"a batch of {name} has shapes {shapes}; the first axis of all must be the example"
            )
        fixed = shapes if same else {key: shape[1:] for key, shape in shapes.items()}
        first = first or fixed
        if fixed != first:
            unit = "batches" if same else "examples"
            raise DataError(
                f"a batch of {name} has shapes {fixed}, not {first}: all {unit} must have the "
                f"same shapes"
            )
        yield batch


def _by_name(tree: Mapping) -> dict[str, Any]:
    """Return the arrays of a dict, which may hold dicts, as "extras.mask"."""
    named: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _by_name(value) if isinstance(value, Mapping) else {"": value}
        named |= {f"{key}.{name}" if name else str(key): a for name, a in inner.items()}
    return named


def _take(tree: Any, rows: np.ndarray) -> Any:
    if isinstance(tree, Mapping):
        return {key: _take(value, rows) for key, value in tree.items()}
    return tree[rows]


def check_arguments(name: str, batch_size: int, seed: int) -> None:
    """Raise ValueError for a batch size or a seed that is out of range."""
    check_count("batch_size", batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed of {name} is {seed}: use 0 to {2**32 - 1}")
