"""Seeded streams of batches that can start at any step, and the held-out examples beside them.

Training is endless: the batch of step s depends on (seed, s) only, so a restored run continues
with `train(s)`, which looks nothing up before step s. A process that works on some positions of
every batch asks for these, `train(s, rows)`, and looks up no others. Each epoch is its own seeded
permutation and epochs follow each other without a gap: a batch may hold the end of one and the
start of the next, all batches have the same size, and no example is left out. Letters: B
batch_size.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpipe_jax.errors import DataError

Batch = dict[str, np.ndarray]  # "inputs" and "labels", the first axis is the example


@dataclass(frozen=True)
class Dataset:
    """A training stream and the held-out examples beside it."""

    name: str
    train: Callable[..., Iterator[Batch]]  # batches from this step on, without end; see `dataset`
    test: Callable[[], Iterator[Batch]]  # each held-out example once, in order; the last B' <= B
    train_examples: int | None = None  # if they are counted
    test_examples: int | None = None


def identity(dataset: Dataset, first: Batch) -> dict[str, int | None]:
    """What tells whether it is the same data set again; `first` is its first batch.

    Labels, because they are as they were read: computed inputs may differ between machines.
    """
    return {
        "train_examples": dataset.train_examples,
        "test_examples": dataset.test_examples,
        "first_labels_crc32": zlib.crc32(np.ascontiguousarray(first["labels"]).tobytes()),
    }


def dataset(
    name: str,
    batch_size: int,
    seed: int,
    train_part: tuple[Callable[[np.ndarray], Batch], int],
    test_part: tuple[Callable[[np.ndarray], Batch], int],
    augment: "Callable[[Batch, Draws], Batch] | None" = None,
) -> Dataset:
    """The data set of two parts, each a function of example indices [B] and its size.

    `augment` changes training batches only, of the rows that are read.
    """
    (gather_train, train_examples), (gather_test, test_examples) = train_part, test_part
    if batch_size > train_examples:
        raise ValueError(
            f"`batch_size` {batch_size} is above the {train_examples} training examples of {name}: "
            f"use {train_examples} or fewer"
        )

    def train(start_step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: steps count from 0")
        order = _order(train_examples, batch_size, seed)
        steps = order.map(lambda index_B: gather_train(index_B if rows is None else index_B[rows]))
        if augment is not None:
            # Its generator is a function of (seed, step).
            steps = steps.random_map(_drawing(augment, batch_size, rows))
        return _read_ahead(steps.slice(slice(start_step, None)))

    def test() -> Iterator[Batch]:
        for start in range(0, test_examples, batch_size):
            yield gather_test(np.arange(start, min(start + batch_size, test_examples)))

    return Dataset(name, train, test, train_examples, test_examples)


def _order(examples: int, batch_size: int, seed: int) -> Any:
    import grain  # takes 1.5 s

    # Indices are batched before the lookup: one numpy gather per batch, not one per example.
    order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
    return order.batch(batch_size, drop_remainder=True)


def _drawing(
    augment: "Callable[[Batch, Draws], Batch]", batch_size: int, rows: np.ndarray | None
) -> Callable[[Batch, np.random.Generator], Batch]:
    return lambda batch, rng: augment(batch, Draws(rng, batch_size, rows))


def _read_ahead(steps: Any) -> Iterator[Batch]:
    import grain

    # One thread works ahead while the devices are busy; grain's default is 16, and 500 batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    try:
        yield from steps.to_iter_dataset(options)
    except DataError as error:  # to which grain has added lines about itself
        raise DataError(str(error).partition("\n")[0]) from error


class Draws:
    """Random numbers for the rows of a batch that are read, drawn as for the whole batch.

    So an example is changed alike whichever process reads it.
    """

    def __init__(
        self, rng: np.random.Generator, batch_size: int, rows: np.ndarray | None = None
    ) -> None:
        self._rng, self._count = rng, batch_size
        self._rows = slice(None) if rows is None else rows

    def integers(self, low: int, high: int, each: int) -> np.ndarray:
        """So many whole numbers for each example, from `low` to below `high`: [rows, each]."""
        return self._rng.integers(low, high, (self._count, each))[self._rows]

    def random(self) -> np.ndarray:
        """A number in [0, 1) for each example: [rows]."""
        return self._rng.random(self._count)[self._rows]


def iterable(
    name: str,
    batches: Callable[[int], Iterable[Batch]],
    test: Callable[[], Iterable[Batch]],
) -> Dataset:
    """A data set of anything that iterates.

    `batches(step)` gives the batches from that step on, each time the same ones, and without end;
    `test()` each held-out example once, in batches that are no larger.
    """

    def train(start_step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        for batch in _checked(name, batches(start_step), same=True):
            yield batch if rows is None else {key: a[rows] for key, a in batch.items()}
        raise DataError(
            f"the training batches of {name} from step {start_step} on came to an end; `batches` "
            f"must go on without one: begin the next epoch"
        )

    return Dataset(name, train, lambda: _checked(name, test(), same=False))


def _checked(name: str, batches: Iterable[Batch], same: bool) -> Iterator[Batch]:
    """The batches, if they are some; of the same shapes, or of any number of such examples."""
    first = None
    for batch in batches:
        if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch):
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"a batch of {name} is {found}; give a dict of inputs and labels")
        shapes = {key: np.shape(a) for key, a in batch.items()}
        if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
            raise DataError(
                f"a batch of {name} has shapes {shapes}; the first axis of all is the example"
            )
        seen = shapes if same else {key: shape[1:] for key, shape in shapes.items()}
        first = first or seen
        if seen != first:
            rule = "all batches have one shape" if same else "all examples have one shape"
            raise DataError(f"a batch of {name} has shapes {seen}, not {first}: {rule}")
        yield batch


def check_arguments(name: str, batch_size: int, seed: int) -> None:
    """Raise ValueError for a batch size or a seed that no data set can have."""
    check_counts(name, batch_size=batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed of {name} is {seed}: use 0 to {2**32 - 1}")


def check_counts(name: str, **counts: int) -> None:
    """Raise ValueError for an argument below one."""
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument} of {name} is {count}: use 1 or more")


def check_fraction(name: str, test_fraction: float) -> None:
    """Raise ValueError for a part that is none, or all."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction of {name} is {test_fraction}: use a number in (0, 1)")
