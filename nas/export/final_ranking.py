"""The best candidates trained again, longer, and ranked anew, as in the paper before scaling up.

What has been trained is kept in the run's folder, in finals.json: a ranking that was interrupted
goes on, and one that was made is read. What has failed is tried anew.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from nas.evaluators import evaluator as evaluators
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome
from nas.spaces.space import Space
from nas.storage import queries
from nas.storage.finals_file import FILE, _read, _write
from nas.storage.reader import CandidateRow, Reader
from nas.training.evaluator import TrainingEvaluator

LONGER = 3  # times the epochs of the search, unless epochs are given


class Finalist(NamedTuple):
    """One of the best of a search."""

    row: CandidateRow
    fitness: float | None  # after training again; None if that failed
    metrics: dict[str, float]
    error: str | None = None  # by which it failed


def rank(
    reader: Reader,
    space: Space[Any],
    evaluator: Any,
    count: int,
    *,
    epochs: int | None = None,
    show: Callable[[Finalist], object] = lambda finalist: None,
) -> list[Finalist]:
    """The best `count` candidates of different networks, the best after `epochs` first.

    Each is trained from scratch, with a seed that the search has not used, as long as it takes.
    ValueError if the search did not train.
    """
    if not isinstance(evaluator, TrainingEvaluator):
        raise ValueError(
            f"`top` {count}: only candidates of a search by real training can be trained again, "
            "and this one's evaluator is another; give 1"
        )
    longer = for_longer(evaluator, epochs)
    told = evaluators.in_search(longer, space, reader.path.parent, "stored", None)
    found = []
    for row in queries.top(reader, count):
        found.append(_finalist(longer, told, reader, space, row))
        show(found[-1])
    sign = -1 if reader.study().maximise else 1
    return sorted(found, key=lambda one: (one.fitness is None, sign * (one.fitness or 0.0)))


def for_longer(evaluator: TrainingEvaluator, epochs: int | None) -> TrainingEvaluator:
    """As it trains finalists: to the end. ValueError if there is no training for so many epochs."""
    epochs = LONGER * evaluator.epochs if epochs is None else epochs
    return replace(evaluator, epochs=epochs, stop_epoch=None, timeout_s=None)


def _finalist(
    longer: TrainingEvaluator, told: Any, reader: Reader, space: Any, row: CandidateRow
) -> Finalist:
    path = reader.path.parent / FILE
    key = f"#{row.id}, {json.dumps(evaluators.goes_by(longer))}"
    done = _read(path)
    if key in done:
        return Finalist(row, done[key]["fitness"], done[key]["metrics"])
    outcome = _train(told, reader, space, row)
    fitness, metrics = outcome.fitness, dict(outcome.metrics)
    if fitness is not None:
        result = {"epochs": longer.epochs, "fitness": fitness, "metrics": metrics}
        # Another may have trained meanwhile.
        _write(path, {**_read(path), key: result})
    return Finalist(row, fitness, metrics, outcome.error)


def _train(evaluator: Any, reader: Reader, space: Space[Any], row: CandidateRow) -> Outcome:
    seed = evaluators.seed(reader.study().settings["seed"], row.id, -1)
    job = Job(0, row.id, space.decode(row.architecture), seed)
    try:
        return outcomes.read(evaluator.evaluate(job), job)
    except (ArithmeticError, MemoryError, RuntimeError, TimeoutError) as error:
        return outcomes.failure(error)
