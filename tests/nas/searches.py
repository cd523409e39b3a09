"""Share a small space, an evaluator of it, and a driver between the tests of searches."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import SHARED_DATA

import nas

DATA = Path(os.environ.get("GPIPE_JAX_DATA") or SHARED_DATA)
HAS_TABLE = (DATA / "nasbench201" / "nb201.npz").exists()
NO_TABLE = f"no NAS-Bench-201 in {DATA}; set GPIPE_JAX_DATA"


class Bits:
    """Search texts of bits; rotations count as duplicates."""

    name = "bits"
    length = 12

    def random(self, rng):
        return tuple(rng.randrange(2) for _ in range(self.length))

    def mutate(self, bits, rng):
        i = rng.randrange(self.length)
        return (*bits[:i], 1 - bits[i], *bits[i + 1 :]), f"flip: bit {i}"

    def canonical(self, bits):
        return min(self.encode(bits[i:] + bits[:i]) for i in range(len(bits)))

    def encode(self, bits):
        return "".join(map(str, bits))

    def decode(self, text):
        return tuple(map(int, text))


def ones(bits) -> float:
    """Return the fitness, which is equal for all rotations."""
    return float(sum(bits))


def small(folder, **options: Any) -> nas.Search:
    """Return a search of bits; `options` override the defaults."""
    defaults = {"space": Bits(), "population": 8, "sample": 3, "cycles": 60, "cache": False}
    return nas.Search(folder=folder, **{**defaults, **options})


def drive(
    search: nas.Search,
    evaluate: Callable[[nas.Job], Any] = lambda job: ones(job.architecture),
    slots: int = 1,
) -> nas.Search:
    """Run to the end with `slots` jobs at once; their order of ending depends on them alone."""
    running: list[nas.Job] = []
    while True:
        while len(running) < slots and (job := search.ask()) is not None:
            running.append(job)
        if not running:
            return search
        job = min(running, key=lambda job: (job.seed, job.candidate))
        running.remove(job)
        search.tell(job, evaluate(job))


def trace(search: nas.Search) -> list[tuple]:
    """Return everything that a search has decided."""
    return [
        (row.id, row.architecture, row.parent, row.mutation, row.state, row.fitness)
        for row in search.store.candidates()
    ]


def population(search: nas.Search) -> list[int]:
    return [row.id for row in search.store.population()]
