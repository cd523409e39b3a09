"""Build the arguments of `nas.search` from a configuration."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gpipe_jax.config.base import section
from gpipe_jax.errors import ArgumentError
from nas.ask_tell.limits import Limit
from nas.choices import COMPILED_COSTS
from nas.config import (
    FunctionConfig,
    LimitsConfig,
    NASBench201Config,
    NASNetConfig,
    SearchConfig,
    TableConfig,
    TrainingConfig,
)
from nas.costs.network_costs import NetworkCosts
from nas.evaluators import evaluator as evaluators
from nas.evaluators.builtin import TabularEvaluator
from nas.evaluators.nasbench201_table import NASBench201Table
from nas.spaces.nasbench201 import NASBench201Space
from nas.spaces.nasnet import NASNetSpace
from nas.training.evaluator import TrainingEvaluator


def arguments(config: SearchConfig) -> dict[str, Any]:
    """Return the arguments of `nas.search`, without name and folder.

    Raises:
        SectionError: A section cannot be realized: a file or a function is missing, for example.
    """
    # Modules of the user's may raise these while they are imported.
    also = (AttributeError, TypeError, RuntimeError)
    with section("space", also):
        space = _space(config.space)
    with section("evaluate", also, file_field="folder"):
        evaluate = _evaluate(config.evaluate)
    with section("limits", also):
        limits = _limits(config.limits, evaluate)
    return {
        "space": space,
        "evaluate": evaluate,
        "limits": limits,
        **config.evolution.model_dump(),
        **config.run.model_dump(exclude={"workdir"}),
    }


def _space(space: NASNetConfig | NASBench201Config) -> NASNetSpace | NASBench201Space:
    if isinstance(space, NASNetConfig):
        return NASNetSpace(space.pairs, space.operations)
    return NASBench201Space()


def _evaluate(evaluate: TableConfig | FunctionConfig | TrainingConfig) -> Any:
    if isinstance(evaluate, TrainingConfig):
        evaluator = TrainingEvaluator(**evaluate.model_dump(exclude={"kind"}))
        evaluator.load_data()  # for its errors
        return evaluator
    if isinstance(evaluate, TableConfig):
        table = NASBench201Table(evaluate.dataset, evaluate.folder)
        return TabularEvaluator(table, evaluate.fitness)
    function = _import_function(evaluate.function)
    try:
        evaluators.as_evaluator(function)
    except TypeError as error:
        path = evaluate.function
        raise ArgumentError("function", f"`function` {path!r}: {error}") from error
    return function


def _import_function(path: str) -> Any:
    """Import a function by module:name, also from the current folder."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise ArgumentError("function", f"`function` {path!r}: expected module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            "function",
            f"`function` {path!r} cannot be imported ({error}); run in the folder of {name}.py, or "
            "install the module",
        ) from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, and exit
        raise ArgumentError(
            "function",
            f"`function` {path!r}: the module {name} raised {type(error).__name__}: {error}; "
            "import it in Python to see where",
        ) from error


def _limits(limits: LimitsConfig, evaluate: Any) -> tuple[Limit, ...]:
    """Return the limits, the cheapest to measure first; an infinite one is recorded only."""
    bounds = {name: getattr(limits, name) for name in ("params_m", "flops_m")}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    if limits.topology:
        bounds |= {name: getattr(limits, name) or math.inf for name in COMPILED_COSTS}
    if not bounds:
        return ()
    if isinstance(evaluate, TabularEvaluator):
        measures = {name: _Column(evaluate.table, name) for name in bounds}
    else:
        costs = _costs(evaluate, limits)
        measures = {name: getattr(costs, name) for name in bounds}
    return tuple(Limit(name, measures[name], bound) for name, bound in bounds.items())


def _costs(evaluate: TrainingEvaluator, limits: LimitsConfig) -> NetworkCosts:
    split = evaluate.load_data()
    return NetworkCosts(
        cells_per_stack=evaluate.cells_per_stack,
        filters=evaluate.filters,
        image=split.images.shape[1],
        channels=split.images.shape[3],
        classes=split.classes,
        dtype=evaluate.dtype,
        batch_size=limits.batch_size,
        topology=limits.topology,
    )


class _Column:
    """Look up a column of a table for an architecture. Old runs have this class in pickles."""

    def __init__(self, table: Callable[[Any], Mapping[str, float]], name: str) -> None:
        self.table, self.name = table, name

    def __call__(self, architecture: Any) -> float:
        return self.table(architecture)[self.name]
