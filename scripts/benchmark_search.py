"""Measure what the search itself costs: its store, its loop, and its memory.

    python scripts/benchmark_search.py [--json] [--rows 100000] [--million]

Evaluations take no time. The space is six choices of five, as in NAS-Bench-201. PyGlove and Optuna
do the same in the same run if they are installed: pip install pyglove optuna. --million evaluates a
million times and prints the memory of the driver on the way.
"""

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nas
from nas.spaces.nasbench201 import OPERATIONS

OPTIONS = {"space": nas.NASBench201Space(), "population": 100, "sample": 25, "cache": False}
EDGES = 6


def fitness(architecture: tuple[int, ...]) -> float:
    """Return a fitness that takes no time to compute."""
    return float(sum(architecture))


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096 / 2**20


def overhead(folder: str, rows: int, measured: int) -> dict[str, float]:
    """Return milliseconds of an `ask` and a `tell` after `rows` results, and seconds to resume."""
    options = {**OPTIONS, "folder": folder, "name": "overhead", "cycles": rows + measured}
    with nas.Search(**options) as search:
        fill(search, rows)
    started = time.perf_counter()
    with nas.Search(**options) as search:
        resume_s = time.perf_counter() - started
        times = []
        while (job := timed(times, search.ask)) is not None:
            timed(times, search.tell, job, fitness(job.architecture))
    pairs = sorted(a + b for a, b in zip(times[0::2], times[1::2], strict=False))
    median, mean = 1000 * pairs[len(pairs) // 2], 1000 * sum(pairs) / len(pairs)
    return {"mean_ms": mean, "median_ms": median, "resume_s": resume_s}


def timed(times: list[float], function: Callable, *arguments: object) -> nas.Job | None:
    """Call the function, append its seconds to `times`, and return its result."""
    started = time.perf_counter()
    result = function(*arguments)
    times.append(time.perf_counter() - started)
    return result


def fill(search: nas.Search, results: int) -> None:
    """Ask and tell until the search has this many results."""
    while search.evolution.results < results and (job := search.ask()) is not None:
        search.tell(job, fitness(job.architecture))


def ours(folder: str, count: int, workers: int) -> float:
    """Return evaluations per second of `nas.search` with its store, in threads."""
    started = time.perf_counter()
    name = f"threads {workers}"
    options = {**OPTIONS, "folder": folder, "name": name, "cycles": count}
    nas.search(evaluate=fitness, workers=workers, **options)
    return count / (time.perf_counter() - started)


def pyglove(folder: str, count: int, workers: int) -> float:
    """Return the rate of PyGlove's regularized evolution, in memory: it has no store of its own."""
    import pyglove as pg  # pyright: ignore[reportMissingImports]

    space = pg.Dict({f"edge{i}": pg.oneof(list(range(len(OPERATIONS)))) for i in range(EDGES)})
    algorithm = pg.evolution.regularized_evolution(population_size=100, tournament_size=25)
    name = f"{folder}/{workers}"
    started = time.perf_counter()

    def work() -> None:
        for example, feedback in pg.sample(space, algorithm, count, name=name):
            feedback(fitness(tuple(example.values())))

    in_threads(work, workers)
    return count / (time.perf_counter() - started)


def optuna(folder: str, count: int, workers: int) -> float:
    """Return the rate of Optuna's random sampler, its quickest, with SQLite."""
    import optuna  # pyright: ignore[reportMissingImports]

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/optuna{workers}.sqlite",
        sampler=optuna.samplers.RandomSampler(seed=0),
        direction="maximize",
    )

    def objective(trial: optuna.Trial) -> float:
        names = [f"edge{i}" for i in range(EDGES)]
        return fitness(tuple(trial.suggest_categorical(n, range(len(OPERATIONS))) for n in names))

    started = time.perf_counter()
    study.optimize(objective, n_trials=count, n_jobs=workers)
    return count / (time.perf_counter() - started)


def in_threads(work: Callable[[], None], workers: int) -> None:
    """Run `work` in this many threads at once."""
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def million(folder: str, count: int) -> list[tuple[int, float]]:
    """Evaluate `count` times; return (evaluations, MiB of the driver) on the way."""
    memory = []
    with nas.Search(**OPTIONS, folder=folder, name="million", cycles=count) as search:
        for done in (1000, 10_000, *range(100_000, count + 1, 100_000)):
            fill(search, done)
            memory.append((done, resident_mib()))
            print(f"{done:>9} evaluations: {memory[-1][1]:.1f} MiB", flush=True)
        size = search.store.path.stat().st_size / 2**20
    print(f"the store has {size:.0f} MiB")
    return memory


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=100_000, help="results before the measurement (100,000)"
    )
    parser.add_argument("--count", type=int, default=2000, help="evaluations to time (2,000)")
    parser.add_argument(
        "--million", action="store_true", help="also measure the driver's memory; minutes"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    for name, least in (("rows", 1), ("count", OPTIONS["population"])):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    figures: dict[str, object] = {
        "machine": f"{platform.machine()}, Python {sys.version.split()[0]}"
    }
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 8):
            rate = ours(folder, options.count, workers)
            figures[f"nas, {workers} threads"] = rate
            print(f"nas, SQLite, threads {workers}: {rate:.0f} evaluations a second", flush=True)
            for name, peer, count in (
                ("pyglove", pyglove, min(options.count, 1000)),
                ("optuna", optuna, min(options.count, 300)),
            ):
                if importlib.util.find_spec(name) is None:
                    print(f"{name}: not installed (pip install {name})")
                    continue
                figures[f"{name}, {workers} threads"] = rate = peer(folder, count, workers)
                store = "SQLite" if name == "optuna" else "in memory"
                print(f"{name}, {store}, threads {workers}: {rate:.0f} a second", flush=True)
        figures["overhead"] = costs = overhead(folder, options.rows, 2000)
        print(
            f"ask and tell at {options.rows} rows: mean {costs['mean_ms']:.2f} ms, median "
            f"{costs['median_ms']:.2f} ms; resumed in {costs['resume_s']:.2f} s"
        )
        if options.million:
            figures["memory_mib"] = million(folder, 1_000_000)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
