"""Compare aging evolution with non-aging evolution and random search, by real training.

    python scripts/compare_search.py [CONFIG] [a.b=c ...] [--seeds 3] [--folder FOLDER] [--json]

CONFIG is the config of a search (configs/search_digits.yaml). The budgets are equal: the number of
results, some of which the cache gives. The seeds, evolution.seed and the next ones, are paired:
with one seed all three algorithms begin with the same random architectures, trained alike.

The table has the mean validation accuracy of the population's last 50 members (of all if it is
smaller), and that of the best candidate after it was trained again, for longer (nan if that failed,
null in JSON). A plot is written to FOLDER/compare.png. Each run is a search of its own in FOLDER.
Run the same command again to resume; finished runs are not repeated.
"""

import argparse
import json
import math
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import nas
from gpipe_jax.config import loader
from gpipe_jax.utils import figures, messages
from nas import from_config
from nas.config import SearchConfig
from nas.evaluators import evaluator as evaluators
from nas.evaluators.evaluator import Job
from nas.evolution.length import length
from nas.export import final_ranking
from nas.storage import queries
from nas.training.evaluator import TrainingEvaluator

ALGORITHMS = {"aging": "#1f77b4", "non_aging": "#d9660a", "random": "#9a9a9a"}
LAST = 50
Measured = dict[str, list[float]]  # by algorithm, for each seed


@dataclass(frozen=True)
class Remembered(nas.Evaluator):
    """Train only once what the runs of one seed have in common, such as their first candidates.

    All randomness comes from the job's seed, so the result would be the same again. `check` refuses
    configs with which a result depends on more than that.
    """

    evaluator: TrainingEvaluator
    results: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def compile_grace_s(self) -> float:
        """Delegate to the wrapped evaluator: the first algorithm compiles for all."""
        return self.evaluator.compile_grace_s

    @property
    def identity(self) -> dict[str, Any]:
        """Delegate to the wrapped evaluator: a search resumes only with the same training."""
        return evaluators.identity_of(self.evaluator)

    def prepare(self, *search: Any) -> "Remembered":
        """Delegate to the wrapped evaluator."""
        return replace(self, evaluator=self.evaluator.prepare(*search))

    def evaluate(self, job: Job) -> dict[str, Any]:
        """Return the result of this architecture and seed, trained now if it is new."""
        key = (job.architecture.to_json(), job.seed)
        if key not in self.results:
            self.results[key] = self.evaluator.evaluate(job)
        return self.results[key]


def check(config: SearchConfig) -> None:
    """Raise ValueError if the runs of a seed cannot share trainings, or would differ in length."""
    evaluate, policy = config.evaluate, config.evolution.fitness_policy
    if evaluate.kind != "training":
        raise ValueError(
            f"evaluate.kind {evaluate.kind}: only training can be compared; use training"
        )
    if evaluate.stop_epoch is not None:
        raise ValueError(
            f"evaluate.stop_epoch {evaluate.stop_epoch}: candidates are trained once for all "
            "algorithms, but this stops them by one population; remove it"
        )
    if policy != "stored":
        raise ValueError(
            f"evolution.fitness_policy {policy}: candidates are trained once for all algorithms, "
            "but this trains them again in each; use stored"
        )
    if config.evolution.algorithm != "aging":
        raise ValueError(
            f"evolution.algorithm {config.evolution.algorithm}: this compares "
            f"{', '.join(ALGORITHMS)}; remove it"
        )
    for name in ("target", "time_limit_s", "evaluations"):
        value = getattr(config.run, name)
        if value is not None:
            raise ValueError(
                f"run.{name} {value:g}: budgets must be equal, but this ends some runs before "
                "run.cycles results; remove it"
            )


def search(config: SearchConfig, overrides: dict[str, Any], folder: Path, **named: Any) -> Any:
    """Run one search to its end, named by its algorithm and seed."""
    algorithm, seed = overrides["algorithm"], overrides["seed"]
    arguments = {**from_config.arguments(config), **overrides, **named}
    started = time.perf_counter()
    result = nas.search(name=f"{algorithm}-{seed}", folder=folder, **arguments)
    counts = result.counts
    print(
        f"{algorithm}, seed {seed}: {counts.results} results, {counts.cache_hits} of them from "
        f"the cache, best {result.best.fitness:.4f}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return result


def compare(
    config: SearchConfig, seeds: int, folder: Path, epochs: int | None
) -> tuple[dict[str, list[Any]], dict[str, Measured]]:
    """Return the runs by algorithm, and the measures of each."""
    evaluator = from_config.arguments(config)["evaluate"]
    final_ranking.for_longer(evaluator, epochs)  # for its errors, before the runs
    runs: dict[str, list[Any]] = {algorithm: [] for algorithm in ALGORITHMS}
    last: Measured = {algorithm: [] for algorithm in ALGORITHMS}
    again: Measured = {algorithm: [] for algorithm in ALGORITHMS}
    first = config.evolution.seed
    for seed in range(first, first + seeds):
        shared = Remembered(evaluator)
        for algorithm in ALGORITHMS:
            overrides = {"algorithm": algorithm, "seed": seed}
            result = search(config, overrides, folder, evaluate=shared)
            runs[algorithm].append(result)
            last[algorithm].append(mean_of_the_last(result))
            (best,) = final_ranking.rank(result.reader, result.space, evaluator, 1, epochs=epochs)
            again[algorithm].append(math.nan if best.fitness is None else best.fitness)
    members = min(LAST, len(runs["aging"][0].reader.population()))
    return runs, {f"population's last {members}": last, "best trained again": again}


def mean_of_the_last(result: Any) -> float:
    """Return the mean fitness of the members that were trained last."""
    return fmean(row.fitness or 0.0 for row in result.reader.population()[-LAST:])


def table(measured: dict[str, Measured], better: Callable[[float], float]) -> list[str]:
    """Return a line for each measure and algorithm: the mean, all seeds, and the lead of aging.

    `better` turns a difference into a lead: it changes the sign if less is better.
    """
    lines = []
    for measure, by_algorithm in measured.items():
        for algorithm, values in by_algorithm.items():
            ahead = [better(a - b) for a, b in zip(by_algorithm["aging"], values, strict=True)]
            shown = " ".join(f"{value:.4f}" for value in values)
            line = f"{measure:<22} {algorithm:<10} {fmean(values):.4f}  ({shown})"
            if algorithm != "aging":
                line += f"  aging ahead by {fmean(ahead):+.4f}{_error(ahead)}"
            lines.append(line)
    return lines


def _error(values: list[float]) -> str:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return ""
    return f" +- {stdev(values) / math.sqrt(len(values)):.4f}"


def as_json(measured: dict[str, Measured]) -> dict[str, dict[str, list[float | None]]]:
    """Replace NaN, which JSON does not have, by None."""
    return {
        measure: {
            algorithm: [value if math.isfinite(value) else None for value in values]
            for algorithm, values in by_algorithm.items()
        }
        for measure, by_algorithm in measured.items()
    }


def plot(runs: dict[str, list[Any]], path: Path) -> None:
    """Plot the mean of the last 50 results and the best so far: mean and range over the seeds."""
    figure = figures.new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for algorithm, color in ALGORITHMS.items():
        courses = [queries.progress(result.reader) for result in runs[algorithm]]
        length = min(len(each.fitness) for each in courses)
        recent = [
            [fmean(each.fitness[max(0, n - LAST) : n]) for n in range(1, length + 1)]
            for each in courses
        ]
        for axes, curves in ((left, recent), (right, [each.best[:length] for each in courses])):
            columns = list(zip(*curves, strict=True))
            counts = range(1, length + 1)
            axes.plot(counts, [fmean(c) for c in columns], color=color, label=algorithm)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(counts, low, high, color=color, alpha=0.15, lw=0)
    for axes, title in ((left, f"mean of the last {LAST} results"), (right, "best so far")):
        axes.set(title=title, xlabel="candidates with a fitness", ylabel="validation accuracy")
        axes.legend(frameon=False)
    path.write_bytes(figures.to_png(figure))


def main() -> int:
    """Print the table. Exit codes: 0 done, 2 bad input, 1 anything else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/search_digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the config")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each algorithm (3)")
    parser.add_argument(
        "--epochs",
        type=int,
        help="epochs of the best, trained again (3 x the search's)",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/compare"), help="folder of the runs"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_intermixed_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    if "=" in options.config:
        options.overrides.insert(0, options.config)
        options.config = parser.get_default("config")
    try:
        return _run(options)
    except (ValueError, OSError, ImportError, sqlite3.Error) as error:
        return messages.fail(error, 2, "compare_search.py")
    except (RuntimeError, TypeError) as error:
        return messages.fail(error, 1, "compare_search.py")
    except KeyboardInterrupt:
        return messages.fail(
            "interrupted; run the same command again to resume", 130, "compare_search.py"
        )


def _run(options: argparse.Namespace) -> int:
    config = loader.load_as(SearchConfig, options.config, options.overrides)
    check(config)
    figures.new_figure(1, 1)  # for the error without matplotlib, before the runs
    runs, measured = compare(config, options.seeds, options.folder, options.epochs)
    sign = 1 if config.evolution.maximise else -1
    print("\n".join(table(measured, lambda value: sign * value)))
    picture = options.folder / "compare.png"
    plot(runs, picture)
    print(f"plot: {picture}")
    if options.json:
        cycles = length(config.run.cycles, config.run.evaluations).cycles
        facts = {"cycles": cycles, "plot": str(picture)}
        print(json.dumps({"measured": as_json(measured), **facts}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
