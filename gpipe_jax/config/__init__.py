"""Define what a run can be told, its defaults, and how a file becomes it; no JAX."""

from gpipe_jax.config.base import Section
from gpipe_jax.config.data import (
    ArrayRecordConfig,
    ArraysConfig,
    Cifar10Config,
    DataConfig,
    DigitsConfig,
    FromFiles,
    PythonConfig,
    SyntheticImagesConfig,
    SyntheticTokensConfig,
    TextConfig,
)
from gpipe_jax.config.models import (
    AmoebaNetConfig,
    ConvNetConfig,
    MlpConfig,
    ModelConfig,
    ResNetConfig,
    TransformerConfig,
)
from gpipe_jax.config.optimizers import AdamConfig, OptimizerConfig, RmsPropConfig, SgdConfig
from gpipe_jax.config.run import Config, MeshConfig, PipelineConfig, ProfileConfig, TrainConfig

__all__ = [
    "AdamConfig",
    "AmoebaNetConfig",
    "ArrayRecordConfig",
    "ArraysConfig",
    "Cifar10Config",
    "Config",
    "ConvNetConfig",
    "DataConfig",
    "DigitsConfig",
    "FromFiles",
    "MeshConfig",
    "MlpConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "ProfileConfig",
    "PythonConfig",
    "ResNetConfig",
    "RmsPropConfig",
    "Section",
    "SgdConfig",
    "SyntheticImagesConfig",
    "SyntheticTokensConfig",
    "TextConfig",
    "TrainConfig",
    "TransformerConfig",
]
