"""Train candidates of a search to the end by both builders, from the same values.

Such training is chaotic: a difference in the last digit grows until the accuracy of an architecture
differs by percents. So the static builder trains each architecture again, from values that differ
in their last digit: "itself" in a row. If the builders differ no more than that, they train alike.
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
from nas.choices import BUILDERS
from nas.config import SearchConfig
from nas.evaluators.evaluator import Job, job_seed
from nas.training import weights
from nas.training.evaluator import TrainingEvaluator
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.translation import to_static
from nas.training.network import Variables

MEASURED = ("fitness", "compile_s", "train_s")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # of JAX
PROGRAMS = ("jit(start)", "jit(epoch)", "jit(validate)")
TRAINED = (*BUILDERS, "itself")
Rows = list[
    dict[str, dict[str, float]]
]  # for each architecture: the results by who trained it, `TRAINED`


def arguments(config: SearchConfig) -> dict[str, Any]:
    """Return the arguments of `nas.search`.

    Raises:
        ValueError, OSError: Nothing can be trained with this config.
    """
    if config.evaluate.kind != "training":
        raise ValueError(
            f"evaluate.kind {config.evaluate.kind}: both builders train; use training, as in "
            "configs/search_digits.yaml"
        )
    arguments = from_config.arguments(config)
    network = replace(arguments["evaluate"], builder="static").network()
    network.encode(arguments["space"].random(Random(0)))  # for its errors
    return arguments


def trained_by_both(search: dict[str, Any], numbers: range) -> Rows:
    """Train random architectures of a search's space, each by both builders in turn.

    `seconds` are those of a whole evaluation, with compilation. Both start from the values that the
    interpreter draws. They get them as those of a parent of the same architecture, which costs the
    static builder one more compilation.

    Args:
        search: The arguments of `nas.search`.
        numbers: Seeds of the architectures.
    """
    with tempfile.TemporaryDirectory() as folder, restored_cache():
        evaluator = search["evaluate"].prepare(search["space"], Path(folder), "retrain_warm", None)
        # An empty cache, so that nothing compiled earlier is used.
        evaluator = replace(evaluator, compilation_cache=str(Path(folder) / "compiled"))
        evaluators = {builder: replace(evaluator, builder=builder) for builder in BUILDERS}
        network = evaluators["interpreter"].network()
        assert isinstance(network, Interpreter)
        return [
            train(evaluators, network, number, search["space"].random(Random(number)))
            for number in numbers
        ]


def train(
    evaluators: dict[str, TrainingEvaluator], network: Interpreter, number: int, genotype: Genotype
) -> dict[str, dict[str, float]]:
    """Train one architecture by each of `TRAINED`; return the measures and the seconds."""
    values = jax.jit(network.init)(network.encode(genotype), jax.random.key(number))
    same = to_static(network, genotype, values)
    row = {}
    for name, start in zip(TRAINED, (values, same, in_the_last_digit(same)), strict=True):
        evaluator = evaluators["static" if name == "itself" else name]
        assert evaluator.run is not None
        weights.save(Path(evaluator.run) / "start.safetensors", genotype, start)
        seed = job_seed(0, number)
        job = Job(number, number, genotype, seed, inherit="start.safetensors")
        started = time.perf_counter()
        with compilations() as compiled:
            result = evaluator.evaluate(job)
        seconds = time.perf_counter() - started
        row[name] = {"seconds": seconds} | {k: result[k] for k in MEASURED}
        row[name]["compilations"] = len(compiled)
        print(number, name, *(f"{k} {v:.4g}" for k, v in row[name].items()), sep="  ", flush=True)
    return row


def in_the_last_digit(values: Variables) -> Variables:
    """Return the values with parameters that differ at random in the last digit."""

    def moved(a: jax.Array) -> jax.Array:
        sign = jax.random.rademacher(jax.random.key(1), a.shape)
        return a + a * sign * jnp.finfo(a.dtype).eps

    return Variables(
        jax.tree.map(moved, values.parameters), jax.tree.map(jnp.copy, values.statistics)
    )


@contextmanager
def restored_cache() -> Iterator[None]:
    """Restore JAX's folder of compiled programs at the end."""
    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  # not in its stubs
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yield a list that collects the names of the search's programs that are compiled."""

    def listen(event: str, duration_secs: float, **details: Any) -> None:
        if event == COMPILE_EVENT and details.get("fun_name") in PROGRAMS:
            names.append(details["fun_name"])

    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def summary(rows: Rows) -> dict[str, Any]:
    """Return mean fitness and candidates per hour by builder, and how much the fitnesses differ.

    Differences are from the static builder's fitnesses, with their standard errors.
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
            # This leaves out all preparation: that of the static builder compiles too.
            "per_hour_without_compiling": 3600 * len(rows) / sum(train_s),
        }
    for name in ("interpreter", "itself"):
        differences = [row[name]["fitness"] - row["static"]["fitness"] for row in rows]
        error = statistics.stdev(differences) / len(rows) ** 0.5
        figures[f"difference of {name}"] = (statistics.mean(differences), error)
    accuracies = [[row[builder]["fitness"] for row in rows] for builder in BUILDERS]
    figures["rank_correlation"] = rank_correlation(*accuracies)
    return figures


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Return Spearman's correlation, or None if all numbers of a side are equal: without order."""
    if min(len(set(a)), len(set(b))) == 1:
        return None
    return statistics.correlation(stats.rankdata(a), stats.rankdata(b))
