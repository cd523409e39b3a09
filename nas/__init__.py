"""Regularized evolution of cell architectures: asynchronous, durable, replayable.

Reading order, which is also that of the imports and of the data:

    space       (nasnet, nasbench201; testing)    what is searched
    evolution                                     what is proposed, and who leaves; no clock, no I/O
    evaluate    (limits)                          what tells how good an architecture is
    schema -> records -> store  (filesystem)      what is written, and read
    state, twins, keeping, opening -> searching   ask and tell
    threads, cluster -> pools, workers -> driver  who evaluates, and the loop
    setup -> result                               nas.search, nas.load, what was found
    scale, finals -> export                       the winner as a config for `gpipe train`
    config -> build -> cli                        the command line
    audit, simulation                             a log replayed; a search on a simulated clock

Candidates are trained for real by `nas.TrainingEvaluator`: see `nas.training`, which loads JAX.
What a person looks at is made from the store, and from what an export has trained again:

    records -> reading -> tables, plots, drawing (nasbench201_drawing, lineage_plot) -> report
            -> page;   live

Names are imported when they are first used, so that `import nas` is quick and loads no JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas import testing
    from nas.ask_tell.limits import Limit, Retries
    from nas.ask_tell.replay import replay
    from nas.ask_tell.search import Search
    from nas.costs.network_costs import NetworkCosts
    from nas.errors import FailuresError, ReplayError
    from nas.evaluators.builtin import Repeated, TabularEvaluator
    from nas.evaluators.evaluator import Job
    from nas.evolution.evolution import Settings
    from nas.result import Candidate, Result, load, search
    from nas.spaces import nasbench201
    from nas.spaces.nasbench201 import NASBench201Space
    from nas.spaces.nasnet import NASNetSpace
    from nas.spaces.space import Space
    from nas.training.evaluator import TrainingEvaluator

_HOME = {
    "Candidate": "result",
    "FailuresError": "ask_tell.limits",
    "Job": "evaluators.evaluator",
    "Limit": "ask_tell.limits",
    "NASBench201Space": "spaces.nasbench201",
    "NASNetSpace": "spaces.nasnet",
    "NetworkCosts": "costs.network_costs",
    "Repeated": "evaluators.builtin",
    "ReplayError": "ask_tell.replay",
    "Result": "result",
    "Retries": "ask_tell.limits",
    "Search": "ask_tell.search",
    "Settings": "evolution.evolution",
    "Space": "spaces.space",
    "TabularEvaluator": "evaluators.builtin",
    "TrainingEvaluator": "training.evaluator",
    "load": "result",
    "replay": "ask_tell.replay",
    "search": "result",
}
_MODULES = {"nasbench201": "spaces.nasbench201", "testing": "testing"}

__all__ = [
    "Candidate",
    "FailuresError",
    "Job",
    "Limit",
    "NASBench201Space",
    "NASNetSpace",
    "NetworkCosts",
    "Repeated",
    "ReplayError",
    "Result",
    "Retries",
    "Search",
    "Settings",
    "Space",
    "TabularEvaluator",
    "TrainingEvaluator",
    "load",
    "nasbench201",
    "replay",
    "search",
    "testing",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"nas.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"nas.{_MODULES[name]}")
    raise AttributeError(f"module 'nas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
