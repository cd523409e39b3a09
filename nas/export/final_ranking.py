"""Train the best candidates of a search again, for longer, and rank them by the result.

Real et al. do the same before they scale their best architectures up. Results are stored in the
run's folder, in finals.json: an interrupted ranking resumes, and a finished one is read. A training
that failed is tried again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from nas.evaluators import evaluator as evaluators
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome
from nas.spaces.space import Space, decode_stored
from nas.storage import queries
from nas.storage.finals_file import FILE, key_of, read_entries, write_entries
from nas.storage.reader import CandidateRow, Reader
from nas.training.evaluator import TrainingEvaluator

EPOCHS_FACTOR = 3
"""Epochs of a finalist per epoch of the search, unless epochs are given."""


class Finalist(NamedTuple):
    """Hold one of the best candidates of a search and the result of training it again."""

    row: CandidateRow
    fitness: float | None  # after training again; None if that failed or was not done
    metrics: dict[str, float]
    error: str | None = None  # why training again failed


def rank(
    reader: Reader,
    space: Space[Any],
    evaluator: TrainingEvaluator,
    count: int,
    *,
    epochs: int | None = None,
    show: Callable[[Finalist], object] | None = None,
) -> list[Finalist]:
    """Train the best candidates of a search again and rank them.

    Each is trained from scratch, to the end, with a seed that the search has not used.

    Args:
        reader: The store of the search.
        space: Its space.
        evaluator: Its evaluator.
        count: Candidates to train; their networks differ.
        epochs: Epochs of the training; default: `EPOCHS_FACTOR` times those of the evaluator.
        show: Called with each candidate that was trained.

    Returns:
        The candidates, the best first and those that failed last.

    Raises:
        ValueError, OSError: There is no training with these epochs, or on these data.
    """
    longer = for_longer(evaluator, epochs)
    prepared = longer.prepare(space, reader.path.parent, "stored", None)
    finalists = []
    for row in queries.top(reader, count):
        finalist = _finalist(longer, prepared, reader, space, row)
        finalists.append(finalist)
        if show is not None:
            show(finalist)
    sign = -1 if reader.study().maximise else 1
    return sorted(finalists, key=lambda each: (each.fitness is None, sign * (each.fitness or 0.0)))


def for_longer(evaluator: TrainingEvaluator, epochs: int | None) -> TrainingEvaluator:
    """Return the evaluator of finalists, which trains every candidate to the end.

    Raises:
        ValueError: The evaluator cannot train for this number of epochs.
    """
    epochs = EPOCHS_FACTOR * evaluator.epochs if epochs is None else epochs
    return replace(evaluator, epochs=epochs, stop_epoch=None, timeout_s=None)


def _finalist(
    longer: TrainingEvaluator, prepared: Any, reader: Reader, space: Any, row: CandidateRow
) -> Finalist:
    path = reader.path.parent / FILE
    key = key_of(row.id, evaluators.identity_of(longer))
    stored = read_entries(path)
    if key in stored:
        return Finalist(row, stored[key]["fitness"], stored[key]["metrics"])
    outcome = _train(prepared, reader, space, row)
    fitness, metrics = outcome.fitness, dict(outcome.metrics)
    if fitness is not None:
        result = {"epochs": longer.epochs, "fitness": fitness, "metrics": metrics}
        # Read the file again: another process may have added results meanwhile.
        write_entries(path, {**read_entries(path), key: result})
    return Finalist(row, fitness, metrics, outcome.error)


def _train(evaluator: Any, reader: Reader, space: Space[Any], row: CandidateRow) -> Outcome:
    # The search uses no tournament -1.
    seed = evaluators.job_seed(reader.study().settings["seed"], row.id, -1)
    job = Job(0, row.id, decode_stored(space, row.architecture), seed)
    try:
        return outcomes.as_outcome(evaluator.evaluate(job), job)
    except (ArithmeticError, MemoryError, RuntimeError, TimeoutError) as error:
        return outcomes.failed_outcome(error)
