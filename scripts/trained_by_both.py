"""Candidates of a search trained to the end by both builders, from the same values.

Such training is chaotic: a difference in the last digit grows until the accuracy of one
architecture differs by percents. So the static builder trains each again, from values that differ
in their last digit: "itself" in a row. The builders train alike if they differ no more than that.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from scipy import stats

from gpipe_jax.genotypes.genotype import Genotype
from nas import from_config
from nas.config import SearchConfig
from nas.evaluators import evaluator as evaluate
from nas.evaluators.evaluator import Job
from nas.training import weights
from nas.training.evaluator import TrainingEvaluator
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.translation import to_static
from nas.training.network import Variables
from nas.training.options import BUILDERS

MEASURED = ("fitness", "compile_s", "train_s")
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
PROGRAMS = ("jit(start)", "jit(epoch)", "jit(validate)")
TRAINED = (*BUILDERS, "itself")
Rows = list[dict[str, dict[str, float]]]  # of an architecture: by what is trained, what was found


def arguments(config: SearchConfig) -> dict[str, Any]:
    """Of `nas.search`; ValueError, or OSError, says why nothing can be trained by it."""
    if config.evaluate.kind != "training":
        raise ValueError(
            f"evaluate.kind {config.evaluate.kind}: both builders train; use training, as in "
            "configs/search_digits.yaml"
        )
    given = from_config.arguments(config)
    replace(given["evaluate"], builder="static").network().encode(given["space"].random(Random(0)))
    return given


def trained_by_both(given: dict[str, Any], numbers: range) -> Rows:
    """Those of the space, at random, one after the other: each by both builders in turn.

    `seconds` are of all that an evaluation takes, compilations among them. The values are those
    that the interpreter draws, handed over as a parent's of the same architecture are, which by
    the layers is a compilation more.
    """
    with tempfile.TemporaryDirectory() as folder, its_own_cache():
        told = given["evaluate"].in_search(given["space"], Path(folder), "retrain_warm", None)
        # Nothing compiled earlier is found again.
        told = replace(told, compilation_cache=str(Path(folder) / "compiled"))
        evaluators = {builder: replace(told, builder=builder) for builder in BUILDERS}
        network = evaluators["interpreter"].network()
        assert isinstance(network, Interpreter)
        rows = []
        for number in numbers:
            rows.append(one(evaluators, network, number, given["space"].random(Random(number))))
        return rows


def one(
    evaluators: dict[str, TrainingEvaluator], network: Interpreter, number: int, genotype: Genotype
) -> dict[str, dict[str, float]]:
    """What each evaluation of one architecture found, and its seconds."""
    values = jax.jit(network.init)(network.encode(genotype), jax.random.key(number))
    same = to_static(network, genotype, values)
    row = {}
    for name, start in zip(TRAINED, (values, same, in_the_last_digit(same)), strict=True):
        evaluator = evaluators["static" if name == "itself" else name]
        assert evaluator.run is not None
        weights.save(Path(evaluator.run) / "start.safetensors", genotype, start)
        seed = evaluate.job_seed(0, number)
        job = Job(number, number, genotype, seed, inherit="start.safetensors")
        begun = time.perf_counter()
        with compilations() as compiled:
            found = evaluator.evaluate(job)
        seconds = time.perf_counter() - begun
        row[name] = {"seconds": seconds} | {k: found[k] for k in MEASURED}
        row[name]["compilations"] = len(compiled)
        print(number, name, *(f"{k} {v:.4g}" for k, v in row[name].items()), sep="  ", flush=True)
    return row


def in_the_last_digit(values: Variables) -> Variables:
    """The values, with parameters changed by that at random."""

    def moved(a: jax.Array) -> jax.Array:
        sign = jax.random.rademacher(jax.random.key(1), a.shape)
        return a + a * sign * jnp.finfo(a.dtype).eps

    return Variables(
        jax.tree.map(moved, values.parameters), jax.tree.map(jnp.copy, values.statistics)
    )


@contextmanager
def its_own_cache() -> Iterator[None]:
    """Where JAX keeps compiled programs is as it was, afterwards."""
    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  # not in its stubs
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the search's programs that are compiled meanwhile."""

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILED and about.get("fun_name") in PROGRAMS:
            found.append(about["fun_name"])

    found: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def summary(rows: Rows) -> dict[str, Any]:
    """By builder the mean fitness and candidates per hour; and how alike the fitnesses are.

    The differences are from the static builder's, with their standard errors.
    """
    figures: dict[str, Any] = {}
    for builder in BUILDERS:
        fitness, train_s, seconds = (
            [row[builder][name] for row in rows] for name in ("fitness", "train_s", "seconds")
        )
        figures[builder] = {
            "fitness": statistics.mean(fitness),
            "compilations": sum(row[builder]["compilations"] for row in rows),
            "per_hour": 3600 * len(rows) / sum(seconds),
            # Nor with other preparations, which by the layers compile too, part by part.
            "per_hour_without_compiling": 3600 * len(rows) / sum(train_s),
        }
    for name in ("interpreter", "itself"):
        apart = [row[name]["fitness"] - row["static"]["fitness"] for row in rows]
        error = statistics.stdev(apart) / len(rows) ** 0.5
        figures[f"difference of {name}"] = (statistics.mean(apart), error)
    accuracies = [[row[builder]["fitness"] for row in rows] for builder in BUILDERS]
    figures["rank_correlation"] = rank_correlation(*accuracies)
    return figures


def rank_correlation(one: list[float], other: list[float]) -> float | None:
    """Spearman's; None if all numbers of one side are alike, which have no order."""
    if min(len(set(one)), len(set(other))) == 1:
        return None
    return statistics.correlation(stats.rankdata(one), stats.rankdata(other))
