"""Pipeline parallelism with micro-batches for any sequence of Flax layers.

Reading order, which is also the order of the imports and of the data:

    config -> zoo (layers) -> cost -> partition -> stages -> state -> composite -> device --+
                                               schedule (who, what, when) ------------------+->
    executor -> pipeline -> trainer -> run, planning

Names are imported when they are first used, so that `import gpipe_jax` is quick, and commands that
need no accelerator (`gpipe schedule`, `gpipe config`) never load one.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpipe_jax import data, losses, optimizer, plots, schedule, sequential, zoo
    from gpipe_jax.config import Config
    from gpipe_jax.layers.layer import Layer, layer
    from gpipe_jax.layers.shapes import count_parameters
    from gpipe_jax.loader import ConfigError, load
    from gpipe_jax.mesh import make_mesh, simulate_devices
    from gpipe_jax.pipeline import Pipeline
    from gpipe_jax.planning.planner import plan
    from gpipe_jax.state import State
    from gpipe_jax.trainer import Trainer

_HOME = {
    "Config": "config",
    "ConfigError": "loader",
    "Layer": "layers.layer",
    "Pipeline": "pipeline",
    "State": "state",
    "Trainer": "trainer",
    "count_parameters": "layers.shapes",
    "layer": "layers.layer",
    "load": "loader",
    "make_mesh": "mesh",
    "plan": "planning.planner",
    "simulate_devices": "mesh",
}
_MODULES = ("data", "losses", "optimizer", "plots", "schedule", "sequential", "zoo")

__all__ = [
    "Config",
    "ConfigError",
    "Layer",
    "Pipeline",
    "State",
    "Trainer",
    "count_parameters",
    "data",
    "layer",
    "load",
    "losses",
    "make_mesh",
    "optimizer",
    "plan",
    "plots",
    "schedule",
    "sequential",
    "simulate_devices",
    "zoo",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"gpipe_jax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"gpipe_jax.{name}")
    raise AttributeError(f"module 'gpipe_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
