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
    from gpipe_jax import data, losses, plots, schedules, sequential, zoo
    from gpipe_jax.config.loader import load
    from gpipe_jax.config.run import Config
    from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
    from gpipe_jax.errors import ConfigError
    from gpipe_jax.layers.layer import Layer, layer
    from gpipe_jax.layers.shape_inference import count_parameters
    from gpipe_jax.pipeline.pipeline import Pipeline
    from gpipe_jax.pipeline.state import State
    from gpipe_jax.planner.planner import plan
    from gpipe_jax.training import optimizers
    from gpipe_jax.training.trainer import Trainer

_HOME = {
    "Config": "config",
    "ConfigError": "config.loader",
    "Layer": "layers.layer",
    "Pipeline": "pipeline.pipeline",
    "State": "pipeline.state",
    "Trainer": "training.trainer",
    "count_parameters": "layers.shape_inference",
    "layer": "layers.layer",
    "load": "config.loader",
    "make_mesh": "distributed.mesh",
    "plan": "planner.planner",
    "simulate_devices": "distributed.mesh",
}
_MODULES = {name: name for name in ("data", "losses", "plots", "schedules", "sequential", "zoo")}
_MODULES["optimizers"] = "training.optimizers"

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
    "optimizers",
    "plan",
    "plots",
    "schedules",
    "sequential",
    "simulate_devices",
    "zoo",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"gpipe_jax.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"gpipe_jax.{_MODULES[name]}")
    raise AttributeError(f"module 'gpipe_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
