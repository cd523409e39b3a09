"""Define the configuration of a run: its settings, defaults and rules, and how a file is read.

`run` holds the whole configuration, `models`, `data` and `optimizers` its sections with kinds, and
`loader` reads files and overrides. No JAX here.
"""

from gpipe_jax.config.base import Section
from gpipe_jax.config.data import DataConfig
from gpipe_jax.config.models import ModelConfig
from gpipe_jax.config.optimizers import OptimizerConfig
from gpipe_jax.config.run import Config, MeshConfig, PipelineConfig, ProfileConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "ProfileConfig",
    "Section",
    "TrainConfig",
]
