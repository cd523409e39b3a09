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
    from nas import nasbench201, testing
    from nas.audit import ReplayError, replay
    from nas.evaluate import Job, Repeated, TabularEvaluator
    from nas.evolution import Settings
    from nas.limits import FailuresError, Limit, Retries
    from nas.nasbench201 import NASBench201Space
    from nas.nasnet import NASNetSpace
    from nas.result import Candidate, Result, load, search
    from nas.searching import Search
    from nas.space import Space
    from nas.training.costs import NetworkCosts
    from nas.training.evaluator import TrainingEvaluator

_HOME = {
    "Candidate": "result",
    "FailuresError": "limits",
    "Job": "evaluate",
    "Limit": "limits",
    "NASBench201Space": "nasbench201",
    "NASNetSpace": "nasnet",
    "NetworkCosts": "training.costs",
    "Repeated": "evaluate",
    "ReplayError": "audit",
    "Result": "result",
    "Retries": "limits",
    "Search": "searching",
    "Settings": "evolution",
    "Space": "space",
    "TabularEvaluator": "evaluate",
    "TrainingEvaluator": "training.evaluator",
    "load": "result",
    "replay": "audit",
    "search": "result",
}
_MODULES = ("nasbench201", "testing")

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
        return importlib.import_module(f"nas.{name}")
    raise AttributeError(f"module 'nas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
