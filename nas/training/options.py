"""What the training of candidates knows by name; no JAX, so that a config is checked at once."""

from pathlib import Path

from gpipe_jax.utils import text

DATASETS = ("digits", "cifar10")
BUILDERS = ("interpreter", "static")
DTYPES = ("float32", "bfloat16")
RUNG = "rung_accuracy"
"""The metric by which hopeless candidates are told: validation accuracy after `stop_epoch`."""


def check_data(name: str) -> None:
    """Raise ValueError for a data set that is neither known nor a file."""
    if name in DATASETS or Path(name).exists():
        return
    hint = text.did_you_mean_or_list(name, DATASETS)
    raise ValueError(
        f"data: unknown data set {name!r}{hint} or give a .npz file with inputs and labels"
    )
