"""Seeded streams of batches that can start at any step, and the held-out examples beside them.

Training is endless: the batch of step s depends on (seed, s) only, so a restored run continues
with `train(s)`, which looks nothing up before step s. Each epoch is its own seeded permutation and
epochs follow each other without a gap: a batch may hold the end of one and the start of the next,
all batches have the same size, and no example is left out. Letters: B batch_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]  # "inputs" and "labels", the first axis is the example


@dataclass(frozen=True)
class Dataset:
    """A training stream and the held-out examples beside it."""

    name: str
    train: Callable[..., Iterator[Batch]]  # batches from this step on, without end; see `dataset`
    test: Callable[[], Iterator[Batch]]  # each held-out example once, in order; the last B' <= B
    train_examples: int
    test_examples: int


def dataset(
    name: str,
    batch_size: int,
    seed: int,
    train_part: tuple[Callable[[np.ndarray], Batch], int],
    test_part: tuple[Callable[[np.ndarray], Batch], int],
    augment: Callable[[Batch, np.random.Generator], Batch] | None = None,
) -> Dataset:
    """The data set of two parts, each a function of example indices [B] and its size.

    `augment` changes training batches only. `train(step, rows)` gives these positions of every
    batch only, for a process that works on them; what they hold does not depend on the others.
    """
    (gather_train, train_examples), (gather_test, test_examples) = train_part, test_part
    if batch_size > train_examples:
        raise ValueError(
            f"batch_size {batch_size} is above the {train_examples} training examples of {name}: "
            f"use {train_examples} or fewer"
        )

    def train(start_step: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: steps count from 0")
        steps = _train_indices(train_examples, batch_size, seed)
        return _batches(steps, start_step, gather_train, augment, rows)

    def test() -> Iterator[Batch]:
        for start in range(0, test_examples, batch_size):
            yield gather_test(np.arange(start, min(start + batch_size, test_examples)))

    return Dataset(name, train, test, train_examples, test_examples)


def _train_indices(examples: int, batch_size: int, seed: int) -> Any:
    import grain  # takes 1.5 s

    # Indices are batched before the lookup: one numpy gather per batch, not one per example.
    order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
    return order.batch(batch_size, drop_remainder=True)


def _batches(
    steps: Any,
    start_step: int,
    gather: Callable[[np.ndarray], Batch],
    augment: Callable[[Batch, np.random.Generator], Batch] | None,
    rows: np.ndarray | None,
) -> Iterator[Batch]:
    import grain

    if augment is not None:
        # Its generator is a function of (seed, step), and draws for the whole batch.
        steps = steps.map(gather).random_map(augment)
        if rows is not None:
            steps = steps.map(lambda batch: {name: a[rows] for name, a in batch.items()})
    else:
        steps = steps.map(lambda index_B: gather(index_B if rows is None else index_B[rows]))
    steps = steps.slice(slice(start_step, None))
    # One thread works ahead while the devices are busy; grain's default is 16, and 500 batches.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


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
