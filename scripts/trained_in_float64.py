"""Candidates of a search trained to the end by both builders in float64, from the same values.

In float32 such training is chaotic: a difference in the last digit grows until the accuracy of one
architecture differs by percents. In float64 that takes longer than most trainings of a search, and
their accuracies tell whether the builders train alike. "itself" in a row is the static builder
again, from values that differ in the last digit: where that differs too, chaos is the reason.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from trained_by_both import Rows

from nas import evaluate
from nas.training import programs
from nas.training.datasets import Split
from nas.training.evaluator import TrainingEvaluator
from nas.training.interpreter import Interpreter
from nas.training.network import Network, PyTree, Values
from nas.training.static import Static
from nas.training.training import Training
from nas.training.translate import to_static


def trained_in_float64(given: dict[str, Any], count: int) -> Rows:
    """So many as `trained_by_both` trains: fitness, and the mean loss of the last epoch."""
    with jax.enable_x64():
        told = given["evaluate"].in_search(given["space"], Path(), "stored", None)
        shape = replace(told.network().shape, dtype="float64")
        interpreter, static = Interpreter(shape, told.operations, told.pairs), Static(shape)
        split = Split(*doubled(tuple(told.data_fits())))
        run = in_double(told, interpreter, split)
        rows = []
        for number in range(count):
            genotype, seed = given["space"].random(Random(number)), evaluate.seed(0, number)
            architecture = interpreter.encode(genotype)
            values = doubled(jax.jit(interpreter.init)(architecture, jax.random.key(number)))
            same = to_static(interpreter, genotype, values)
            once = in_double(told, static, split)  # so that no other's programs fill the memory
            own = static.encode(genotype)
            row = {
                "interpreter": run(architecture, values, seed),
                "static": once(own, same, seed),
                "itself": once(own, in_the_last_digit(same), seed),
            }
            print(number, *(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
            rows.append(row)
        return rows


def in_double(evaluator: TrainingEvaluator, network: Network, split: Split) -> Callable:
    """(architecture, values, seed) -> what the evaluator's training from these values finds."""
    recipe = evaluator._recipe()
    epoch = jax.jit(functools.partial(programs.epoch, network, recipe), donate_argnums=0)
    validate = jax.jit(functools.partial(programs.validate, network))

    def run(architecture: Any, values: Values, seed: int) -> dict[str, float]:
        # Copies, as the epoch takes what it is given for its results.
        state = programs.fresh(recipe, jax.tree.map(jnp.copy, values))
        made = programs.Programs(
            lambda *_: (state, 0), epoch, validate, network.inherit, recipe.batch_size, split
        )
        found = Training(made, architecture, evaluator._course(), seed).run()
        return {name: found[name] for name in ("fitness", "train_loss")}

    return run


def in_the_last_digit(values: Values) -> Values:
    """The values, with parameters changed by that at random."""

    def moved(a: jax.Array) -> jax.Array:
        sign = jax.random.rademacher(jax.random.key(1), a.shape)
        return a + a * sign * jnp.finfo(a.dtype).eps

    return Values(jax.tree.map(moved, values.parameters), jax.tree.map(jnp.copy, values.statistics))


def doubled(tree: PyTree) -> PyTree:
    """On the device, what is float32 in float64."""
    wide = lambda a: jnp.asarray(a, "float64" if a.dtype == np.float32 else a.dtype)  # noqa: E731
    return jax.tree.map(wide, tree)


def report(figures: dict[str, Any]) -> None:
    """Print how alike trainings were, and the static builder's to its own."""
    rows, ranks = figures["rows"], figures["rank_correlation"]
    counts = [sum(apart(row, name) < 1e-6 for row in rows) for name in ("interpreter", "itself")]
    print(
        f"{len(rows)} candidates trained in float64: mean accuracy, interpreter "
        f"{figures['interpreter']['fitness']:.4f}, static {figures['static']['fitness']:.4f}; they "
        f"differ by {figures['difference']:.4f} +- {figures['standard_error']:.4f}, their ranks "
        f"correlate {'undefined' if ranks is None else format(ranks, '.3f')}; the last losses of "
        f"{counts[0]} are the same to 1e-6, of the static program and itself {counts[1]}"
    )


def apart(row: dict[str, dict[str, float]], name: str) -> float:
    """How far the loss is from the static builder's, relative to that."""
    wanted = row["static"]["train_loss"]
    return abs(row[name]["train_loss"] - wanted) / abs(wanted)
