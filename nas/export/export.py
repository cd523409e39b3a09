"""What a search has found, as a file: the genotype alone, or a config for `gpipe train`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpipe_jax.genotypes.genotype import Genotype
from nas.export import final_ranking, scaled_config
from nas.export.final_ranking import Finalist
from nas.result import Result
from nas.training.evaluator import TrainingEvaluator
from nas.workers.pickled_setup import setup_of

CONFIGS = (".yaml", ".yml")


class Wanted(NamedTuple):
    """Where to, and how large the network of a config is to be."""

    out: Path
    top: int = 1  # candidates that are trained again and ranked anew
    epochs: int | None = None  # of that training
    cells: int = scaled_config.CELLS
    filters: int = scaled_config.FILTERS
    stages: int = scaled_config.STAGES


def export(
    result: Result, wanted: Wanted, show: Callable[[Finalist], object] = lambda finalist: None
) -> list[Finalist]:
    """Write the best candidate's file; returns the ranking, the best first.

    ValueError, or OSError, says what cannot be written, before anything is trained.
    """
    out = wanted.out
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another name")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first")
    for name, value in (("top", wanted.top), ("epochs", wanted.epochs)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` {value}: expected at least 1")
    if wanted.epochs is not None and wanted.top == 1:
        raise ValueError(
            f"`epochs` {wanted.epochs} and `top` 1: only if several are ranked anew is there a "
            "training; give `top` 2 or more, or leave `epochs` out"
        )
    best = next(result.reader.ranked(), None)
    if best is None:
        raise ValueError(f"{result.path} has no result yet: wait for the first evaluation")
    if out.suffix in CONFIGS:
        _config(result, best.architecture, wanted)
    ranking = [Finalist(best, None, {})]  # not trained again
    if wanted.top > 1:
        ranking = _trained_again(result, wanted, show)
    text = json.dumps(architecture(ranking[0].row.architecture)) + "\n"
    if out.suffix in CONFIGS:
        config, of = _config(result, ranking[0].row.architecture, wanted)
        text = scaled_config.text(config, _title(result, ranking, wanted), of.note, str(out))
    out.write_text(text, encoding="utf-8")
    return ranking


def architecture(text: str) -> Any:
    """An architecture as its space writes it: an object where that is JSON, or else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _trained_again(
    result: Result, wanted: Wanted, show: Callable[[Finalist], object]
) -> list[Finalist]:
    named = {"epochs": wanted.epochs, "show": show}
    ranking = final_ranking.rank(
        result.reader, result.space, _evaluator(result), wanted.top, **named
    )
    if ranking[0].fitness is None:
        raise ValueError(
            f"`top` {wanted.top}: all {len(ranking)} have failed when trained again, the last by "
            f"{ranking[-1].error}; mend that, or give 1"
        )
    return ranking


def _evaluator(result: Result) -> Any:
    """As it was pickled with the run, without what repeats it; None if it could not be pickled."""
    if result.reader.setup() is None:
        return None
    try:
        found = setup_of(result.reader).evaluate
    except ValueError as error:
        raise ValueError(
            f"{result.path}: what the search trained on cannot be read ({error.__cause__}); run "
            "where its modules can be imported, or export to a .json file, without `top`"
        ) from error
    while not isinstance(found, TrainingEvaluator) and hasattr(found, "evaluator"):
        found = found.evaluator
    return found


def _config(result: Result, text: str, wanted: Wanted) -> tuple[dict, scaled_config.Target]:
    try:
        genotype = Genotype.from_json(text)
    except ValueError as error:
        raise ValueError(
            f"{result.path} searched the space {result.study.space!r}, but only cells of nasnet "
            f"can be scaled up for gpipe train; export to a .json file"
        ) from error
    of = scaled_config.target(_evaluator(result))
    sizes = {"cells": wanted.cells, "filters": wanted.filters, "stages": wanted.stages}
    return scaled_config.sections(genotype, of, **sizes), of


def _title(result: Result, ranking: list[Finalist], wanted: Wanted) -> str:
    best = ranking[0]
    title = f"The best candidate of the search {result.study.name}, #{best.row.id}"
    title += f" (fitness {best.row.fitness:.6g}"
    if len(ranking) > 1:
        title += f"; trained again, {best.fitness:.6g}, the best of {len(ranking)}"
    size = f"{wanted.cells} normal cells, N = {wanted.cells // 3}, and {wanted.filters} filters"
    return f"{title}), scaled up: {size}."
