"""List the legal values of training options, so that a config is checked without JAX."""

from pathlib import Path
from typing import Literal, get_args

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import text

Builder = Literal["interpreter", "static"]
Dtype = Literal["float32", "bfloat16"]
BUILDERS: tuple[str, ...] = get_args(Builder)
DTYPES: tuple[str, ...] = get_args(Dtype)
DATASETS = ("digits", "cifar10")
RUNG = "rung_accuracy"
"""Metric that decides whether a candidate is hopeless: validation accuracy after `stop_epoch`."""


def check_data(name: str) -> None:
    """Raise ValueError if a data set is neither known nor a file."""
    if name in DATASETS or Path(name).exists():
        return
    hint = text.did_you_mean_or_list(name, DATASETS)
    raise ArgumentError(
        "data", f"data: unknown data set {name!r}{hint} or give a .npz file with inputs and labels"
    )
