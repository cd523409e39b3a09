"""Read the table of NAS-Bench-201: accuracies, times and sizes of every architecture."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpipe_jax.utils import paths
from gpipe_jax.utils.choices import FOLDER_VARIABLE
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.choices import TABLE_DATASETS
from nas.keywords import suggesting
from nas.spaces.nasbench201 import Edges


@suggesting()
class NASBench201Table:
    """Look up the metrics of a cell on one data set; the file is read at the first look-up.

    Calling the table with an architecture returns a dict of numbers::

        valid12     accuracy on validation data after 12 epochs, in percent: what searches use
        test200     accuracy on test data after 200 epochs, in percent: what papers report
        time_s      seconds that 12 epochs take
        params_m    millions of parameters
        flops_m     millions of operations

    Args:
        dataset: cifar10, cifar100 or imagenet16_120. Default: cifar10.
        folder: Folder that holds nb201.npz or nasbench201/nb201.npz; default: the environment
            variable GPIPE_JAX_DATA.

    Raises:
        ValueError: The data set is unknown; at a look-up, the file cannot be read, or the
            architecture is not a cell of this space.
        FileNotFoundError: There is no such file.

    Example::

        table = nas.NASBench201Table("cifar10")
        table((3, 3, 3, 3, 3, 3))["valid12"]
    """

    def __init__(self, dataset: str = "cifar10", folder: str | Path | None = None) -> None:
        if dataset not in TABLE_DATASETS:
            suggestion = did_you_mean_or_list(dataset, TABLE_DATASETS)
            raise ValueError(f"dataset: unknown {dataset!r}{suggestion}")
        self.dataset = dataset
        self.path = find_table(folder)

    def __call__(self, architecture: Edges) -> Mapping[str, float]:
        """Return all metrics of a cell; raise ValueError for anything else."""
        try:
            row = self.rows[tuple(architecture)]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{architecture!r} is not a cell of NAS-Bench-201: expected the operations of six "
                "edges, each a number from 0 to 4; use nas.NASBench201Space"
            ) from error
        return {name: float(column[row]) for name, column in self.columns.items()}

    @property
    def rows(self) -> dict[Edges, int]:
        """Return the row of every cell."""
        return _load(self.path, self.dataset)[0]

    @property
    def columns(self) -> dict[str, Any]:
        """Return arrays [15625] of float64, by metric."""
        return _load(self.path, self.dataset)[1]


@functools.lru_cache(maxsize=len(TABLE_DATASETS))
def _load(path: Path, dataset: str) -> tuple[dict[Edges, int], dict[str, Any]]:
    """Return the row of every cell, and the columns."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            rows = {tuple(edges): row for row, edges in enumerate(file["ops"].tolist())}
            # For CIFAR-10 the 12 epochs use half of the training images, called cifar10_valid.
            timed = "cifar10_valid" if dataset == "cifar10" else dataset
            columns = {
                "valid12": file[f"valid12_{dataset}"],
                "test200": file[f"test200_{dataset}"],
                "time_s": file[f"time200_{timed}_est_s"] * (12 / 200),
                "params_m": file["params_m"],
                "flops_m": file["flops_m"],
            }
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as NAS-Bench-201's table: {error}") from error
    return rows, columns


def find_table(folder: str | Path | None = None) -> Path:
    """Return the table's file: nb201.npz in `folder`, or in a folder nasbench201 within it.

    The default is the folder that the environment variable GPIPE_JAX_DATA names.
    """
    given = folder or os.environ.get(FOLDER_VARIABLE)
    if not given:
        raise FileNotFoundError(
            f"`folder` of NAS-Bench-201 is not given and {FOLDER_VARIABLE} is not set: give one "
            "that holds nb201.npz"
        )
    root = paths.local("folder", given)
    for path in (root / "nb201.npz", root / "nasbench201" / "nb201.npz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"cannot find NAS-Bench-201: {root} has no nb201.npz; put it there")
