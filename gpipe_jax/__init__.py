"""Train any list of Flax layers as a pipeline with micro-batches.

The public names are those of `__all__`; everything else may change between versions. A file
imports only from the folders below its own:

    cli                                   the commands of `gpipe`
    planner                               memory and time on a TPU slice, predicted; best layouts
    training                              optimizers, the trainer, runs that save and resume
    run_folder                            the folder of a run, which no other run may use
    checkpoint                            one file format for every layout; export
    pipeline                              the program of all devices
    partition, zoo, sequential            balanced stages; networks; the reference
    layers, config, tpu_compiler          Flax layers; settings; compile without a TPU
    distributed, genotypes, data, plots   meshes, hosts; cells; data sets; pictures
    progress, known_code, own_code        the progress of a command; code of the user
    schedules, losses                     orders of work; losses
    utils, errors                         what everything else uses

Names are imported when they are first used. So `import gpipe_jax` is quick, and commands that need
no accelerator (`gpipe schedule`, `gpipe config`) never load one.
"""

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpipe_jax import data, errors, losses, plots, schedules, sequential, zoo
    from gpipe_jax.checkpoint.warm_start import WarmStart, warm_start
    from gpipe_jax.config.loader import load
    from gpipe_jax.config.run import Config
    from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
    from gpipe_jax.errors import ConfigError
    from gpipe_jax.layers.layer import Layer
    from gpipe_jax.layers.shape_inference import count_parameters
    from gpipe_jax.layers.sources.describe import layer
    from gpipe_jax.layers.sources.from_module import from_module
    from gpipe_jax.pipeline.pipeline import Pipeline
    from gpipe_jax.pipeline.state import State, TrainState
    from gpipe_jax.planner.planner import plan
    from gpipe_jax.training import optimizers
    from gpipe_jax.training.fitting.early_stopping import EarlyStopping
    from gpipe_jax.training.trainer import Trainer

    __version__: str

# Each public name and its home, "module:name"; "module:" is the module itself.
_HOME = {
    "Config": "config.run:Config",
    "ConfigError": "errors:ConfigError",
    "EarlyStopping": "training.fitting.early_stopping:EarlyStopping",
    "Layer": "layers.layer:Layer",
    "Pipeline": "pipeline.pipeline:Pipeline",
    "State": "pipeline.state:State",
    "TrainState": "pipeline.state:TrainState",
    "Trainer": "training.trainer:Trainer",
    "WarmStart": "checkpoint.warm_start:WarmStart",
    "count_parameters": "layers.shape_inference:count_parameters",
    "data": "data:",
    "errors": "errors:",
    "from_module": "layers.sources.from_module:from_module",
    "layer": "layers.sources.describe:layer",
    "load": "config.loader:load",
    "losses": "losses:",
    "make_mesh": "distributed.mesh:make_mesh",
    "optimizers": "training.optimizers:",
    "plan": "planner.planner:plan",
    "plots": "plots:",
    "schedules": "schedules:",
    "sequential": "sequential:",
    "simulate_devices": "distributed.mesh:simulate_devices",
    "warm_start": "checkpoint.warm_start:warm_start",
    "zoo": "zoo:",
}

# Public names of version 0.1, and their names now.
_RENAMED = {"optimizer": "optimizers", "schedule": "schedules"}

__all__ = [
    "Config",
    "ConfigError",
    "EarlyStopping",
    "Layer",
    "Pipeline",
    "State",
    "TrainState",
    "Trainer",
    "WarmStart",
    "count_parameters",
    "data",
    "errors",
    "from_module",
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
    "warm_start",
    "zoo",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return pkgutil.resolve_name(f"gpipe_jax.{_HOME[name]}")
    if name == "__version__":
        import importlib.metadata  # takes longer than the rest of this module

        return importlib.metadata.version("gpipe-jax")
    message = f"module 'gpipe_jax' has no attribute {name!r}"
    if name in _RENAMED:
        message += f"; it is named {_RENAMED[name]!r} since version 0.2"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted(__all__)
