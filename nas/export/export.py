"""Export the result of a search: the genotype alone, or a config for `gpipe train`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils.checks import count_problem
from nas.errors import ExportOptionError, OutputExistsError, OutputFolderError
from nas.evaluators.builtin import Repeated
from nas.export import final_ranking, scaled_config
from nas.export.final_ranking import Finalist
from nas.pickles.setup import load_setup
from nas.result import Result
from nas.training.evaluator import TrainingEvaluator

CONFIG_SUFFIXES = (".yaml", ".yml")


class ExportOptions(NamedTuple):
    """Name the output file of an export and the size of the network in its config.

    Attributes:
        out: The file to write. A name that ends in .yaml or .yml gets a config, others a genotype.
        top: Candidates that are trained again, for longer, and ranked; 1 trains none.
        epochs: Epochs of that training. None: three times the search's.
        cells_per_stack: Normal cells in each of the network's three stacks (N).
        filters: Filters of the first stack (F).
        stages: Pipeline stages of the config, one device each.
    """

    out: Path
    top: int = 1
    epochs: int | None = None
    cells_per_stack: int = scaled_config.CELLS_PER_STACK
    filters: int = scaled_config.FILTERS
    stages: int = scaled_config.STAGES


def export(
    result: Result,
    options: ExportOptions,
    show: Callable[[Finalist], object] | None = None,
) -> list[Finalist]:
    """Write the best candidate of a search to a file.

    With `options.top` of 2 or more the best candidates are trained again first, and the best of
    these is written. Nothing is trained if the file cannot be written afterwards.

    Args:
        result: The search.
        options: The output file, the training and the size of the network.
        show: Called with each candidate that was trained again.

    Returns:
        The ranking, the best candidate first.

    Raises:
        OutputExistsError: The output file exists already; also a FileExistsError.
        OutputFolderError: Its folder does not exist; also a FileNotFoundError.
        ExportOptionError: Another option cannot be used.
        ValueError: The search has no result yet, or it cannot be exported as a config.
        OSError: The data of the search cannot be read, or the file cannot be written.
    """
    _check(options)
    best = next(result.reader.ranked(), None)
    if best is None:
        raise ValueError(f"{result.path} has no result yet; wait for the first evaluation")
    is_config = options.out.suffix in CONFIG_SUFFIXES
    if is_config:  # for its errors, before anything is trained
        _config(result, best.architecture, options)
    ranking = [Finalist(best, None, {})]  # not trained again
    if options.top > 1:
        ranking = _train_again(result, options, show)
    winner = ranking[0].row.architecture
    if is_config:
        config, target = _config(result, winner, options)
        title = _title(result, ranking, options)
        text = scaled_config.text(config, title, target.note, str(options.out))
    else:
        text = json.dumps(as_json(winner)) + "\n"
    options.out.write_text(text, encoding="utf-8")
    return ranking


def as_json(architecture: str) -> Any:
    """Return a stored architecture as a JSON value: parsed if it is JSON, else the text itself."""
    try:
        return json.loads(architecture)
    except ValueError:
        return architecture


def _check(options: ExportOptions) -> None:
    out = options.out
    if out.exists():
        raise OutputExistsError("out", out, "already exists; choose another name")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise OutputFolderError("out", out, f"the folder {out.parent} does not exist; create it")
    for name in ("top", "epochs", "cells_per_stack", "filters", "stages"):
        value = getattr(options, name)
        problem = None if value is None and name == "epochs" else count_problem(value)
        if problem is not None:
            raise ExportOptionError(name, value, problem)
    if options.epochs is not None and options.top == 1:
        raise ExportOptionError(
            "epochs",
            options.epochs,
            "candidates are trained again only if `top` is at least 2, got 1; increase `top`, or "
            "leave `epochs` out",
        )


def _train_again(
    result: Result, options: ExportOptions, show: Callable[[Finalist], object] | None
) -> list[Finalist]:
    evaluator = _evaluator(result)
    if not isinstance(evaluator, TrainingEvaluator):
        raise ExportOptionError(
            "top",
            options.top,
            "only a search by real training can train its candidates again, and the evaluator of "
            "this one is another; use 1",
        )
    ranking = final_ranking.rank(
        result.reader, result.space, evaluator, options.top, epochs=options.epochs, show=show
    )
    if ranking[0].fitness is None:
        raise ExportOptionError(
            "top",
            options.top,
            f"all {len(ranking)} candidates failed when they were trained again; the last error: "
            f"{ranking[-1].error}. Fix this error, or use 1",
        )
    return ranking


def _evaluator(result: Result) -> Any:
    """Return the unpickled evaluator without its wrappers, or None if it was not pickled."""
    if result.reader.setup() is None:
        return None
    try:
        setup = load_setup(result.reader, needed=["evaluate"], trust=result.trust)
    except ValueError as error:
        raise ValueError(
            f"the evaluator of the search cannot be read: {error}; or export to a .json file, "
            "without `top`"
        ) from error
    evaluator = setup.evaluate
    while isinstance(evaluator, Repeated):
        evaluator = evaluator.evaluator
    return evaluator


def _config(
    result: Result, architecture: str, options: ExportOptions
) -> tuple[dict[str, dict[str, Any]], scaled_config.Target]:
    try:
        genotype = Genotype.from_json(architecture)
    except ValueError as error:
        raise ValueError(
            f"{result.path} searched the space {result.study.space!r}, but only cells of nasnet "
            "can be scaled up for gpipe train; export to a .json file"
        ) from error
    target = scaled_config.target(_evaluator(result))
    config = scaled_config.sections(
        genotype,
        target,
        cells_per_stack=options.cells_per_stack,
        filters=options.filters,
        stages=options.stages,
    )
    return config, target


def _title(result: Result, ranking: list[Finalist], options: ExportOptions) -> str:
    best, N = ranking[0], options.cells_per_stack
    fitness = f"fitness {best.row.fitness:.6g}"
    if len(ranking) > 1:
        fitness += f"; trained again, {best.fitness:.6g}, the best of {len(ranking)}"
    return (
        f"The best candidate of the search {result.study.name}, #{best.row.id} ({fitness}), "
        f"scaled up: {3 * N} normal cells (N = {N}) and {options.filters} filters."
    )
