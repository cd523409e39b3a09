"""From a configuration to the arguments of `nas.search`."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gpipe_jax.errors import section
from nas.ask_tell.limits import Limit
from nas.config import (
    FunctionConfig,
    LimitsConfig,
    NASNetConfig,
    SearchConfig,
    TableConfig,
    TrainingConfig,
)
from nas.costs.network_costs import COMPILED, NetworkCosts
from nas.evaluators.builtin import TabularEvaluator
from nas.evaluators.nasbench201_table import NASBench201Table
from nas.spaces.nasbench201 import NASBench201Space
from nas.spaces.nasnet import NASNetSpace
from nas.training.evaluator import TrainingEvaluator


def arguments(config: SearchConfig) -> dict[str, Any]:
    """For `nas.search`, but for name and folder; SectionError says what cannot be made."""
    run = config.run.model_dump(exclude={"workdir"})
    also = (AttributeError, TypeError, RuntimeError)  # of a function or a module of the user's
    with section("space", also):
        space = _space(config.space)
    with section("evaluate", also):
        evaluate = _evaluate(config.evaluate)
    with section("limits", also):
        limits = _limits(config.limits, evaluate)
    return {
        "space": space,
        "evaluate": evaluate,
        "limits": limits,
        **config.evolution.model_dump(),
        **run,
    }


def _space(space: Any) -> Any:
    if isinstance(space, NASNetConfig):
        return NASNetSpace(space.pairs, space.operations)
    return NASBench201Space()


def _evaluate(evaluate: TableConfig | FunctionConfig | TrainingConfig) -> Any:
    if isinstance(evaluate, TrainingConfig):
        found = TrainingEvaluator(**evaluate.model_dump(exclude={"kind"}))
        found.data_fits()
        return found
    if isinstance(evaluate, TableConfig):
        return TabularEvaluator(
            NASBench201Table(evaluate.dataset, evaluate.folder), evaluate.fitness
        )
    name, colon, attribute = evaluate.function.partition(":")
    if not (name and colon and attribute):
        raise ValueError(f"`function` {evaluate.function!r}: expected module:name")
    if os.getcwd() not in sys.path:  # where the module most likely is
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`function` {evaluate.function!r} cannot be imported ({error}); run in the folder of "
            f"{name}.py, or install it"
        ) from error


def _limits(limits: LimitsConfig, evaluate: Any) -> tuple[Limit, ...]:
    """Those that are given, and what is recorded only; the cheapest to measure first."""
    found = {name: getattr(limits, name) for name in ("params_m", "flops_m")}
    found = {name: value for name, value in found.items() if value is not None}
    if limits.topology:
        found |= {name: getattr(limits, name) or math.inf for name in COMPILED}
    if not found:
        return ()
    if isinstance(evaluate, TabularEvaluator):
        return tuple(Limit(name, _Column(evaluate.table, name), found[name]) for name in found)
    costs = _costs(evaluate, limits)
    return tuple(Limit(name, getattr(costs, name), found[name]) for name in found)


def _costs(evaluate: TrainingEvaluator, limits: LimitsConfig) -> NetworkCosts:
    data = evaluate.data_fits()
    return NetworkCosts(
        cells_per_stack=evaluate.cells_per_stack,
        filters=evaluate.filters,
        image=data.images.shape[1],
        channels=data.images.shape[3],
        classes=data.classes,
        dtype=evaluate.dtype,
        batch_size=limits.batch_size,
        topology=limits.topology,
    )


class _Column:
    """One of a table's columns, as a function of an architecture."""

    def __init__(self, table: Callable[[Any], Mapping[str, float]], name: str) -> None:
        self.table, self.name = table, name

    def __call__(self, architecture: Any) -> float:
        return self.table(architecture)[self.name]
