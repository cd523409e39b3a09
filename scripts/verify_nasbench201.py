"""Check the search on NAS-Bench-201, where the right answers are known.

    python scripts/verify_nasbench201.py --folder FOLDER [--json]

FOLDER holds nb201.npz and reference_curves.csv, or a folder nasbench201 with them; the default is
the environment variable GPIPE_JAX_DATA. The curves are the closed form of random search, and means
over 1,000 runs of another implementation of regularized evolution. All time is simulated. "z" is
the difference in standard errors of both.
"""

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, NamedTuple

import nas
from nas.choices import TABLE_DATASETS
from nas.evaluators.evaluator import Job, Outcome
from nas.evaluators.nasbench201_table import NASBench201Table
from nas.evolution.evolution import Evolution
from nas.evolution.simulation import FinishedJob, StorelessLoop, simulate
from nas.spaces.nasbench201 import NASBench201Space

SPACE = NASBench201Space()
KILLED, STRAGGLERS, SLOWER = 0.1, 0.05, 10.0
NOISE = 1.0  # percent of accuracy


class Row(NamedTuple):
    """Hold a line of the table."""

    name: str
    measured: str
    expected: str
    ok: bool | None  # None if it is only measured: nothing is expected
    figures: dict


class Lookup:
    """Hold a table's columns as plain dicts, which are quicker."""

    def __init__(self, dataset: str, folder: Path | None) -> None:
        table = NASBench201Table(dataset, folder)
        self.path, names = table.path, ("valid12", "test200", "time_s")
        self.valid, self.test, self.time_s = (
            dict(zip(table.rows, table.columns[name].tolist(), strict=True)) for name in names
        )

    def work(self, job: Job) -> tuple[Outcome, float]:
        """Return the outcome of twelve epochs of one cell, and their seconds."""
        return Outcome("ok", self.valid[job.architecture]), self.time_s[job.architecture]


def best(lookup: Lookup, done: list[FinishedJob], counts: list[int]) -> list[float]:
    """Return the test accuracy of the best cell by reported fitness after each of `counts`."""
    accuracies, results, top_fitness, top_cell = [], 0, -math.inf, ()
    for each in done:
        fitness = each.outcome.fitness
        if fitness is None:
            continue
        results += 1
        if fitness > top_fitness:
            top_fitness, top_cell = fitness, each.job.architecture
        if results in counts:
            accuracies.append(lookup.test[top_cell])
    return accuracies


def loop(
    seed: int, cycles: int, population: int = 100, sample: int = 25, **rest: Any
) -> StorelessLoop:
    """Return a search without a store."""
    settings = nas.Settings(population=population, sample=sample, seed=seed, **rest)
    return StorelessLoop(Evolution(SPACE, settings), cycles)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def against(name: str, values: list[float], expected: float, error: float = 0.0) -> Row:
    """Expect a mean to be within four standard errors of another one."""
    mean, own = mean_and_error(values)
    z = (mean - expected) / math.hypot(own, error)
    figures = {"mean": mean, "standard_error": own, "wanted": expected, "z": z, "runs": len(values)}
    measured = f"{mean:.3f} +- {own:.3f} (z {z:+.1f})"
    return Row(name, measured, f"{expected:.3f} within 4 standard errors", abs(z) <= 4, figures)


# --- the lines of the table -----------------------------------------------------------------------


def curves(path: Path) -> dict[tuple, tuple[float, float]]:
    """Return mean test accuracy and its standard error by (data set, P, S, n).

    P is 0 for random search.
    """
    reference = {}
    with (path.parent / "reference_curves.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (row["dataset"], int(row["P"] or 0), int(row["S"] or 0), int(row["n_evals"]))
            error = float(row["test200_std"] or 0) / math.sqrt(float(row["runs"] or 1))
            reference[key] = float(row["test200_mean"]), error
    return reference


def random_search(lookups: dict[str, Lookup], runs: int) -> Iterator[Row]:
    """Compare random search with the closed form."""
    reference, counts = curves(lookups["cifar10"].path), [10, 20, 50, 100, 150, 200, 300, 500]
    accuracies: dict[str, list[list[float]]] = {dataset: [] for dataset in TABLE_DATASETS}
    for seed in range(runs):
        search_loop = loop(seed, 500, 1, 1, algorithm="random")
        cells = [search_loop.evolution.propose(k).architecture for k in range(500)]
        for dataset, lookup in lookups.items():
            done = [
                FinishedJob(0.0, Job(k, k, cell, 0), Outcome("ok", lookup.valid[cell]))
                for k, cell in enumerate(cells)
            ]
            accuracies[dataset].append(best(lookup, done, counts))
    for dataset in TABLE_DATASETS:
        for n, values in zip(counts, zip(*accuracies[dataset], strict=True), strict=True):
            yield against(
                f"random search, {dataset}, {n}", list(values), reference[dataset, 0, 0, n][0]
            )


def evolution(lookups: dict[str, Lookup], runs: int) -> Iterator[Row]:
    """Compare evolution with the curves, one evaluation at a time."""
    reference, counts = curves(lookups["cifar10"].path), [150, 200, 500]
    for dataset, lookup in lookups.items():
        for P, S in ((100, 25), (20, 5), (10, 3)):
            accuracies = [
                best(lookup, simulate(loop(seed, 500, P, S), lookup.work), counts)
                for seed in range(runs)
            ]
            for n, values in zip(counts, zip(*accuracies, strict=True), strict=True):
                name = f"evolution, {dataset}, P={P} S={S}, {n}"
                yield against(name, list(values), *reference[dataset, P, S, n])


def budget(lookup: Lookup, runs: int) -> Iterator[Row]:
    """Search 12,000 s on CIFAR-10; published: 93.92 +- 0.30, random search 93.70 +- 0.36."""
    for algorithm, published in (("aging", 93.92), ("random", 93.70)):
        accuracies = []
        for seed in range(runs):
            search_loop = loop(seed, 400, 10, 3, algorithm=algorithm)
            done = [each for each in simulate(search_loop, lookup.work) if each.at_s <= 12_000]
            accuracies += best(lookup, done, [len(done)])
        mean, deviation = fmean(accuracies), stdev(accuracies)
        measured = f"{mean:.2f} +- {deviation:.2f} (deviation)"
        figures = {"mean": mean, "deviation": deviation, "runs": runs}
        name = f"12,000 s, cifar10, P=10 S=3, {algorithm}"
        yield Row(name, measured, f"published {published}", None, figures)


def noisy(lookup: Lookup, runs: int) -> Iterator[Row]:
    """Compare algorithms with a noisy fitness: true test accuracy after 500 evaluations."""

    def work(job: Job) -> tuple[Outcome, float]:
        noise = Random(job.seed).gauss(0.0, NOISE)
        return Outcome("ok", lookup.valid[job.architecture] + noise), 1.0

    accuracies = {}
    for algorithm in ("aging", "non_aging", "elitist", "random"):
        values = []
        for seed in range(runs):
            done = simulate(loop(seed, 500, algorithm=algorithm), work)
            values += best(lookup, done, [500])
        accuracies[algorithm] = mean_and_error(values)
    mean, error = accuracies["aging"]
    for algorithm, (other, other_error) in accuracies.items():
        z = (mean - other) / math.hypot(error, other_error)
        name, measured = f"noisy, cifar10, {algorithm}, 500", f"{other:.3f} +- {other_error:.3f}"
        figures = {"mean": other, "standard_error": other_error, "runs": runs}
        expected = "" if algorithm == "aging" else "aging not worse by 2 standard errors"
        yield Row(name, measured, expected, z >= -2, figures)


def search(folder: str, seed: int, cycles: int, **options: Any) -> nas.Search:
    """Return a search with its store."""
    return nas.Search(
        space=SPACE, name=f"{seed}", folder=folder, seed=seed, cycles=cycles, **options
    )


def killed(lookup: Lookup, runs: int) -> Iterator[Row]:
    """Kill a tenth of the evaluations of eight workers half way; check the store and replay it."""
    reference, accuracies, kills = curves(lookup.path), [], 0

    def work(job: Job) -> tuple[Outcome, float]:
        seconds = lookup.time_s[job.architecture]
        if Random(f"{job.seed} {job.attempt}").random() < KILLED:
            return Outcome("worker_death", error="killed"), seconds / 2
        return Outcome("ok", lookup.valid[job.architecture]), seconds

    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            retries = nas.Retries(worker_death=99)
            with search(folder, seed, 200, cache=False, retries=retries) as tested:
                accuracies.append(best(lookup, simulate(tested, work, slots=8), [150, 200]))
                counts, members = tested.store.counts(), tested.store.population()
                assert counts.results == counts.evaluations == 200 and len(members) == 100
                assert all(tested.store.attempts(n, None, "ok") == 1 for n in range(200))
                nas.replay(tested.store, SPACE)
                kills += counts.failures
    for n, values in zip([150, 200], zip(*accuracies, strict=True), strict=True):
        name = f"8 workers, {kills} of {kills + 200 * runs} killed, P=100 S=25, {n}"
        yield against(name, list(values), *reference["cifar10", 100, 25, n])


def stragglers(lookup: Lookup, runs: int) -> Iterator[Row]:
    """Make one evaluation in twenty ten times slower, for 32 workers: asynchronous or generations.

    An asynchronous search waits for stragglers only once, at its end. A search that continues is
    expected to take at most 1/5. With the wait at its end 500 results miss that; both are shown.
    """

    def work(job: Job) -> tuple[Outcome, float]:
        slow = SLOWER if Random(job.seed).random() < STRAGGLERS else 1.0
        outcome, seconds = lookup.work(job)
        return outcome, seconds * slow

    def hours(seed: int, cycles: int, results: int, synchronous: bool) -> float:
        done = simulate(loop(seed, cycles), work, slots=32, synchronous=synchronous)
        return done[results - 1].at_s / 3600

    for results, extra_results, name in (
        (500, 32, "500 results of a search that continues"),
        (500, 0, "500 to the end"),
        (1000, 0, "1,000 to the end"),
        (2000, 0, "2,000 to the end"),
    ):
        quick, slow = (
            fmean(hours(seed, results + extra, results, synchronous) for seed in range(runs))
            for synchronous, extra in ((False, extra_results), (True, 0))
        )
        ratio = quick / slow
        measured = f"{quick:.2f} h / {slow:.2f} h = {ratio:.3f}"
        figures = {"asynchronous_h": quick, "synchronous_h": slow, "runs": runs}
        is_met = ratio <= 0.2
        if extra_results:
            yield Row(f"stragglers, {name}", measured, "at most 0.2", is_met, figures)
        else:
            note = "0.2 is met" if is_met else "0.2 is missed"
            yield Row(f"stragglers, {name}", measured, note, None, figures)


def cached(lookup: Lookup, runs: int) -> Iterator[Row]:
    """Search with and without the cache: evaluations of 200 proposals, and the best of 200.

    Eight workers. Every fitness must be that of the cell that was trained.
    """
    tests: dict[bool, list[float]] = {True: [], False: []}
    evaluations: dict[bool, int] = {True: 0, False: 0}
    for seed in range(runs):
        for cache in (True, False):
            folder, cycles = tempfile.TemporaryDirectory(), 600 if cache else 200
            with folder as name, search(name, seed, cycles, cache=cache) as tested:
                done = simulate(tested, lookup.work, slots=8, max_jobs=200)
                tests[cache] += best(lookup, done, [len(done)])
                rows = list(tested.store.candidates())
                evaluations[cache] += sum(row.answered_by is None for row in rows[:200])
                for row in rows:
                    trained = row if row.answered_by is None else rows[row.answered_by]
                    if row.fitness is not None:
                        cell = SPACE.decode(trained.architecture)
                        assert row.fitness == trained.fitness == lookup.valid[cell]
    (mean, error), (plain, plain_error) = (mean_and_error(tests[key]) for key in (True, False))
    share = evaluations[True] / evaluations[False]
    figures = {"evaluations": share, "test200": mean, "test200_without": plain, "runs": runs}
    yield Row("cache, evaluations of 200 proposals", f"{share:.2f}", "below 1", share < 1, figures)
    measured = f"{mean:.3f} +- {error:.3f} / {plain:.3f} +- {plain_error:.3f}"
    yield Row(
        "cache, test accuracy at 200 evaluations", measured, "not lower", mean >= plain, figures
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder of the table and the curves")
    parser.add_argument("--runs", type=int, default=200, help="runs of most lines (200)")
    parser.add_argument("--only", help="only the lines of the function of this name")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    options = parser.parse_args()
    try:
        lookups = {dataset: Lookup(dataset, options.folder) for dataset in TABLE_DATASETS}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    runs, cifar10 = options.runs, lookups["cifar10"]
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "random_search": lambda: random_search(lookups, 5 * runs),
        "evolution": lambda: evolution(lookups, runs),
        "budget": lambda: budget(cifar10, 5 * runs // 2),
        "noisy": lambda: noisy(cifar10, runs),
        "killed": lambda: killed(cifar10, runs),
        "stragglers": lambda: stragglers(cifar10, max(runs // 10, 1)),
        "cached": lambda: cached(cifar10, runs),
    }
    rows, started = [], time.perf_counter()
    for name, part in parts.items():
        for row in part() if options.only in (None, name) else ():
            mark = {True: "ok", False: "NOT MET", None: "measured only"}[row.ok]
            print(f"{row.name:<50} {row.measured:<42} {row.expected}: {mark}", flush=True)
            rows.append(row)
    wall_s = time.perf_counter() - started
    judged = [row.ok for row in rows if row.ok is not None]
    only = len(rows) - len(judged)
    print(f"{sum(judged)} of {len(judged)} as expected, {only} only measured, in {wall_s:.0f} s")
    if options.json:
        lines = {row.name: {**row.figures, "ok": row.ok} for row in rows}
        print(json.dumps({"rows": lines, "wall_s": wall_s}))
    sys.exit(0 if all(judged) else 1)


if __name__ == "__main__":
    main()
