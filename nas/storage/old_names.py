"""Translate names that versions before 0.2 wrote into runs, so that old runs are read and resumed.

A run has two kinds of such names. Its settings are JSON with the fields of evaluators and limits.
Its setup is a pickle with the modules, classes and fields of space, evaluator and limits.
"""

from collections.abc import Collection, Mapping
from typing import Any

MODULES = {
    "gpipe_jax.genotype": "gpipe_jax.genotypes.genotype",
    "gpipe_jax.published": "gpipe_jax.genotypes.amoebanet",
    "nas.audit": "nas.ask_tell.replay",
    "nas.build": "nas.from_config",
    "nas.evaluate": "nas.evaluators.evaluator",
    "nas.evolution": "nas.evolution.evolution",
    "nas.limits": "nas.ask_tell.limits",
    "nas.nasbench201": "nas.spaces.nasbench201",
    "nas.nasnet": "nas.spaces.nasnet",
    "nas.searching": "nas.ask_tell.search",
    "nas.setup": "nas.pickles.setup",
    "nas.space": "nas.spaces.space",
    "nas.training.costs": "nas.costs.network_costs",
}
"""Each old module to the one that holds its classes now."""

CLASSES = {
    ("nas.evaluate", "Repeated"): ("nas.evaluators.builtin", "Repeated"),
    ("nas.evaluate", "ReturnError"): ("nas.errors", "ReturnError"),
    ("nas.evaluate", "TabularEvaluator"): ("nas.evaluators.builtin", "TabularEvaluator"),
    ("nas.limits", "FailuresError"): ("nas.errors", "FailuresError"),
    ("nas.nasbench201", "Table"): ("nas.evaluators.nasbench201_table", "NASBench201Table"),
}
"""Each old class whose name changed, or whose module was divided, to the present one."""

FIELDS = {
    "NetworkCosts": {"cells": "cells_per_stack"},
    "TrainingEvaluator": {
        "cells": "cells_per_stack",
        "validation": "validation_images",
        "validations": "final_epochs",
    },
}
"""For each class its old fields and what they are called now."""

_TRAINING = {"cells", "validation", "validations", "builder", "stop_epoch"}
"""Old fields of `TrainingEvaluator`, by which the JSON of a subclass is known."""

_COSTS = {"cells", "filters", "image", "channels", "classes", "dtype", "batch_size", "topology"}
"""Old fields of `NetworkCosts`, by which a limit's JSON is known to be one of its measures."""


def current_class(module: str, name: str) -> tuple[str, str]:
    """Return where a class of an old module, or a method such as "Table.rows", is now."""
    owner, dot, member = name.partition(".")
    module, owner = CLASSES.get((module, owner), (MODULES.get(module, module), owner))
    return module, owner + dot + member


def current_fields(
    kind: str, values: Mapping[str, Any], own: Collection[str] = ()
) -> dict[str, Any]:
    """Rename the old fields of an object of this class, or of a subclass.

    A name stays if its new name is there too, or if it is one of a subclass's `own` fields.
    """
    names = {
        old: new
        for old, new in FIELDS.get(kind, {}).items()
        if new not in values and old not in own
    }
    return {names.get(name, name): value for name, value in values.items()}


def current_evaluator(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the old fields in an evaluator's JSON, and in that of an evaluator within it."""
    kind = "TrainingEvaluator" if identity.keys() >= _TRAINING else identity.get("kind", "")
    renamed = current_fields(kind, identity)
    return {
        name: current_evaluator(value) if isinstance(value, Mapping) else value
        for name, value in renamed.items()
    }


def current_limit(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the old fields in a limit's JSON."""
    return current_fields("NetworkCosts" if identity.keys() >= _COSTS else "", identity)
