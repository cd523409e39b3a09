"""The best candidates trained again, longer, and ranked anew, as in the paper before scaling up.

What has been trained is kept in the run's folder, in finals.json: a ranking that was interrupted
goes on, and one that was made is read. What has failed is tried anew.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nas.evaluators import evaluator as evaluators
from nas.evaluators.evaluator import Job, Outcome
from nas.spaces.space import Space
from nas.storage import queries
from nas.storage.reader import CandidateRow, Reader
from nas.training.evaluator import TrainingEvaluator

FILE = "finals.json"
LONGER = 3  # times the epochs of the search, unless epochs are given


class Finalist(NamedTuple):
    """One of the best of a search."""

    row: CandidateRow
    fitness: float | None  # after training again; None if that failed
    metrics: dict[str, float]
    error: str | None = None  # by which it failed


class Again(NamedTuple):
    """What came of training a candidate again."""

    candidate: int
    epochs: int | None  # None in files of older versions
    fitness: float


def known(reader: Reader) -> list[Again]:
    """All that has been trained again so far, the best first."""
    found = [
        Again(int(key[1:].partition(",")[0]), one.get("epochs"), one["fitness"])
        for key, one in _read(reader.path.parent / FILE).items()
    ]
    return sorted(found, key=lambda one: one.fitness, reverse=reader.study().maximise)


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
        return evaluators.read(evaluator.evaluate(job), job)
    except (ArithmeticError, MemoryError, RuntimeError, TimeoutError) as error:
        return evaluators.failure(error)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, done: dict[str, Any]) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
