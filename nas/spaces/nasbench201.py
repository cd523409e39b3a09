"""The space of NAS-Bench-201 and its table (Dong and Yang 2020, https://arxiv.org/abs/2001.00326).

A cell has four nodes; each of the six edges between them, from an earlier node to a later one, is
one of five operations. All 15,625 cells have been trained, so that a search takes no time.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

Edges = tuple[int, ...]  # an operation for each edge, by its place in OPERATIONS

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
DATASETS = ("cifar10", "cifar100", "imagenet16_120")
FOLDER_VARIABLE = "GPIPE_JAX_DATA"
_INTO: dict[int, list[int]] = {
    node: [i for i, edge in enumerate(EDGES) if edge[1] == node] for node in (1, 2, 3)
}


class NASBench201Space:
    """Cells of six edges, as the tuple of their operations' numbers."""

    name = "nasbench201"

    def random(self, rng: Random) -> Edges:
        """Every edge's operation equally likely."""
        return tuple(rng.randrange(len(OPERATIONS)) for _ in EDGES)

    def mutate(self, architecture: Edges, rng: Random) -> tuple[Edges, str]:
        """Another operation for one edge: any node, any of its edges, as in the authors' code."""
        edge = rng.choice(_INTO[rng.randrange(1, 4)])
        old = architecture[edge]
        new = (old + rng.randrange(1, len(OPERATIONS))) % len(OPERATIONS)
        source, target = EDGES[edge]
        words = f"op: edge {source} to {target}, {OPERATIONS[old]} -> {OPERATIONS[new]}"
        return (*architecture[:edge], new, *architecture[edge + 1 :]), words

    def canonical(self, architecture: Edges) -> str:
        """The sum of terms that the cell computes: 4,930 different ones.

        Skips are written as what they pass on, and what is `none`, or reads nothing else, is left
        out. The authors' `to_unique_str` tells 6,466 apart, as the terms of nested sums keep their
        order in it, and zeros stay: each of its classes is within one of these. That zeros give
        zeros is exact for convolutions without a bias; the benchmark's batch norms have one, so
        that a convolution of zeros is a constant there, which this takes for nothing.
        """
        nodes = [["x"]]
        for node in (1, 2, 3):
            terms = [_terms(architecture[edge], nodes[EDGES[edge][0]]) for edge in _INTO[node]]
            nodes.append(sorted(term for edge in terms for term in edge))
        return " + ".join(nodes[-1]) or "0"

    def encode(self, architecture: Edges) -> str:
        """`|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|`, as the benchmark writes cells."""
        return "+".join(
            "|" + "".join(f"{OPERATIONS[architecture[e]]}~{EDGES[e][0]}|" for e in _INTO[node])
            for node in (1, 2, 3)
        )

    def decode(self, text: str) -> Edges:
        """Of the benchmark's text; ValueError if it is no cell."""
        found = re.findall(r"(\w+)~\d", text)
        if all(name in OPERATIONS for name in found) and len(found) == len(EDGES):
            edges = tuple(OPERATIONS.index(name) for name in found)
            if self.encode(edges) == text:
                return edges
        raise ValueError(
            f"architecture {text!r} is no cell of NAS-Bench-201: expected a text such as "
            f"{self.encode((3,) * len(EDGES))!r}"
        )


def _terms(operation: int, source: list[str]) -> list[str]:
    """What an edge adds to its node."""
    if operation == 0 or not source:
        return []
    return source if operation == 1 else [f"{OPERATIONS[operation]}({' + '.join(source)})"]


class Table:
    """What is known of every cell on one data set, read when it is first asked for.

    `valid12` is the accuracy on validation data after 12 epochs, in percent, which is what searches
    see; `test200` that on test data after 200 epochs, which is what papers report; `time_s` the
    seconds that 12 epochs take; `params_m` and `flops_m` millions of parameters and operations.
    """

    def __init__(self, dataset: str = "cifar10", folder: str | Path | None = None) -> None:
        if dataset not in DATASETS:
            raise ValueError(f"dataset: unknown {dataset!r}; known: {', '.join(DATASETS)}")
        self.dataset = dataset
        self.path = find(folder)

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


def find(folder: str | Path | None = None) -> Path:
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
