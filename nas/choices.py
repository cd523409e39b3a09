"""List the legal values of options, for configurations and the classes that take them; no JAX."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from gpipe_jax.utils.text import did_you_mean_or_list

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
"""Say what is better in a metric: less, or more."""


def check_directions(directions: Any) -> Any:
    """Return what is better in metrics, as given, if it is legal: a dict, or None.

    Raises:
        ValueError: It is not a dict with texts as names, or a direction is unknown.

    >>> check_directions({"latency_ms": "minimum"})
    Traceback (most recent call last):
    ValueError: 'minimum' of 'latency_ms' is unknown; did you mean 'min'?
    """
    if directions is None:
        return None
    if not (isinstance(directions, Mapping) and all(isinstance(name, str) for name in directions)):
        raise ValueError(
            f"expected the names of metrics, each with min or max, such as "
            f"{{latency_ms: min}}, got {directions!r}"
        )
    for name, direction in directions.items():
        if name == "fitness":
            raise ValueError(
                f"'fitness' is not another metric, so it cannot have the direction {direction!r}; "
                f"set `maximise` instead"
            )
        if direction not in DIRECTIONS:
            suggestion = did_you_mean_or_list(direction, DIRECTIONS)
            raise ValueError(f"{direction!r} of {name!r} is unknown{suggestion}")
    return directions
