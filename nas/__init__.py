"""Search for cell architectures by regularized evolution: asynchronous, durable, replayable.

The public names are those of `__all__`; everything else may change between versions. A file
imports only from the folders and modules below its own:

    cli                              the commands of `nas`
    from_config, export              arguments from a file; the winner as a file
    result, costs                    `search`, `load`; the cost of a network before it is trained
    reports, training                text, pages and plots; training of one candidate
    workers                          threads, devices, processes, and the driver that feeds them
    pickles                          spaces and evaluators for the store and for other processes
    ask_tell                         the search as an open loop: cache, limits, retries, replay
    storage, config                  one SQLite file for each run; settings
    evolution                        what is proposed, and which member leaves
    evaluators, testing              what gives the fitness; a check of a search space
    spaces                           what is searched
    fingerprints                     what tells that code has changed
    errors, choices, keywords        every exception; names of options and of arguments

    space --> evolution --> ask_tell --> workers --> evaluators (training)
                               |  ^                      |
                   storage <---+  +------ Outcome -------+
                      |
                      +--> result, reports, export

Names are imported when they are first used. So `import nas` is quick. Only training, costs,
`workers="devices"` and an export to .yaml load JAX.
"""

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nas import errors, testing
    from nas.ask_tell.limits import Limit, Retries
    from nas.ask_tell.replay import replay
    from nas.ask_tell.search import Search
    from nas.costs.network_costs import NetworkCosts
    from nas.errors import FailuresError, ReplayError
    from nas.evaluators.builtin import Repeated, TabularEvaluator
    from nas.evaluators.evaluator import Evaluator, Job
    from nas.evaluators.nasbench201_table import NASBench201Table
    from nas.evolution.evolution import Settings
    from nas.result import Candidate, Result, load, search
    from nas.spaces.nasbench201 import NASBench201Space
    from nas.spaces.nasnet import NASNetSpace
    from nas.spaces.space import DrawableSpace, Space
    from nas.training.evaluator import TrainingEvaluator

    __version__: str

# Each public name and its home, "module:name"; "module:" is the module itself.
_HOME = {
    "Candidate": "result:Candidate",
    "DrawableSpace": "spaces.space:DrawableSpace",
    "Evaluator": "evaluators.evaluator:Evaluator",
    "FailuresError": "errors:FailuresError",
    "Job": "evaluators.evaluator:Job",
    "Limit": "ask_tell.limits:Limit",
    "NASBench201Space": "spaces.nasbench201:NASBench201Space",
    "NASBench201Table": "evaluators.nasbench201_table:NASBench201Table",
    "NASNetSpace": "spaces.nasnet:NASNetSpace",
    "NetworkCosts": "costs.network_costs:NetworkCosts",
    "Repeated": "evaluators.builtin:Repeated",
    "ReplayError": "errors:ReplayError",
    "Result": "result:Result",
    "Retries": "ask_tell.limits:Retries",
    "Search": "ask_tell.search:Search",
    "Settings": "evolution.evolution:Settings",
    "Space": "spaces.space:Space",
    "TabularEvaluator": "evaluators.builtin:TabularEvaluator",
    "TrainingEvaluator": "training.evaluator:TrainingEvaluator",
    "errors": "errors:",
    "load": "result:load",
    "replay": "ask_tell.replay:replay",
    "search": "result:search",
    "testing": "testing:",
}

# Public names of version 0.1, and their names now.
_RENAMED = {"nasbench201": "NASBench201Space and NASBench201Table"}

__all__ = [
    "Candidate",
    "DrawableSpace",
    "Evaluator",
    "FailuresError",
    "Job",
    "Limit",
    "NASBench201Space",
    "NASBench201Table",
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
    "errors",
    "load",
    "replay",
    "search",
    "testing",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return pkgutil.resolve_name(f"nas.{_HOME[name]}")
    if name == "__version__":
        import importlib.metadata  # takes longer than the rest of this module

        return importlib.metadata.version("gpipe-jax")
    message = f"module 'nas' has no attribute {name!r}"
    if name in _RENAMED:
        message += f"; see {_RENAMED[name]}, the names since version 0.2"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted(__all__)
