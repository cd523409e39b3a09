"""Read the table of NAS-Bench-201: accuracies and times of every architecture."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.spaces.nasbench201 import Edges

DATASETS = ("cifar10", "cifar100", "imagenet16_120")


FOLDER_VARIABLE = "GPIPE_JAX_DATA"


class NASBench201Table:
    """What is known of every cell on one data set, read when it is first asked for.

    `valid12` is the accuracy on validation data after 12 epochs, in percent, which is what searches
    see; `test200` that on test data after 200 epochs, which is what papers report; `time_s` the
    seconds that 12 epochs take; `params_m` and `flops_m` millions of parameters and operations.
    """

    def __init__(self, dataset: str = "cifar10", folder: str | Path | None = None) -> None:
        if dataset not in DATASETS:
            raise ValueError(f"dataset: unknown {dataset!r}; known: {', '.join(DATASETS)}")
        self.dataset = dataset
        self.path = find_table(folder)

    def __call__(self, architecture: Edges) -> Mapping[str, float]:
        """All columns of one cell."""
        row = self.rows[architecture]
        return {name: float(column[row]) for name, column in self.columns.items()}

    @property
    def rows(self) -> dict[Edges, int]:
        """The row of every cell."""
        return _read(self.path, self.dataset)[0]

    @property
    def columns(self) -> dict[str, Any]:
        """Arrays [15625] of float64, by name."""
        return _read(self.path, self.dataset)[1]


@functools.lru_cache(maxsize=len(DATASETS))
def _read(path: Path, dataset: str) -> tuple[dict[Edges, int], dict[str, Any]]:
    """The row of every cell, and the columns."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            rows = {tuple(edges): row for row, edges in enumerate(file["ops"].tolist())}
            time = "cifar10_valid" if dataset == "cifar10" else dataset
            columns = {
                "valid12": file[f"valid12_{dataset}"],
                "test200": file[f"test200_{dataset}"],
                "time_s": file[f"time200_{time}_est_s"] * (12 / 200),
                "params_m": file["params_m"],
                "flops_m": file["flops_m"],
            }
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as NAS-Bench-201's table: {error}") from error
    return rows, columns


def find_table(folder: str | Path | None = None) -> Path:
    """The table's file nb201.npz: in `folder`, or in a folder nasbench201 within it.

    The default is the folder that the environment variable GPIPE_JAX_DATA names.
    """
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise FileNotFoundError(
            f"`folder` of NAS-Bench-201 is not given and {FOLDER_VARIABLE} is not set: give one "
            "that holds nb201.npz"
        )
    root = Path(named).expanduser()
    for place in (root / "nb201.npz", root / "nasbench201" / "nb201.npz"):
        if place.exists():
            return place
    raise FileNotFoundError(f"cannot find NAS-Bench-201: {root} has no nb201.npz; put it there")
