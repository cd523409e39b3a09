"""List the legal values of options, for configurations and the classes that take them; no JAX."""

from typing import Literal, get_args

Builder = Literal["interpreter", "static"]
Dtype = Literal["float32", "bfloat16"]
TrainingDataset = Literal["digits", "cifar10"]
TableDataset = Literal["cifar10", "cifar100", "imagenet16_120"]
CompiledCost = Literal["latency_ms", "memory_mib"]
Direction = Literal["min", "max"]

BUILDERS: tuple[Builder, ...] = get_args(Builder)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DATASETS: tuple[TrainingDataset, ...] = get_args(TrainingDataset)
"""Data sets that candidates are trained on, besides files."""

TABLE_DATASETS: tuple[TableDataset, ...] = get_args(TableDataset)
"""Data sets of the table of NAS-Bench-201."""

COMPILED_COSTS: tuple[CompiledCost, ...] = get_args(CompiledCost)
"""Costs of a network that the TPU compiler has to estimate."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""What is better in a metric: less, or more."""
