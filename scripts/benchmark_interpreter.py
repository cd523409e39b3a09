"""Compare the two builders of a search's networks: one program for all, and one for each.

    python scripts/benchmark_interpreter.py               # equality, times, candidates per hour
    python scripts/benchmark_interpreter.py --image 32    # steps on larger images
    python scripts/benchmark_interpreter.py --tpu         # also memory, by the compiler for TPU v5e
    python scripts/benchmark_interpreter.py --json        # one JSON object as the last line

Architectures are drawn at random, with seeds 0, 1, ... Both programs are one training step. They
train from the same values, on one batch, for --steps steps after a first one that is not timed.
They take turns; times are medians, and ratios are quotients of medians. The difference of their
losses is the largest of all steps, relative to the loss. Such training is chaotic, so a control is
printed too: the difference of the static program from itself, started from values that differ in
the last digit.

Then candidates of a search (--config) are trained to the end by both builders in turn, from the
same values, and by the static program again from values that differ in the last digit. Candidates
per hour count whole evaluations, with compilation. In a longer search the interpreter's one
compilation weighs less.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

from gpipe_jax import errors

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
import trained_by_both

from gpipe_jax import losses
from gpipe_jax.config import loader
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.tpu_compiler import compiler, libtpu, topologies
from gpipe_jax.tpu_compiler.results import Program
from gpipe_jax.utils import console, messages
from nas.choices import BUILDERS
from nas.config import SearchConfig
from nas.spaces.nasnet import NASNetSpace
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.translation import to_static
from nas.training.network import Network, PyTree, Shape, Variables
from nas.training.static import Static

RATE, MOMENTUM = 0.05, 0.9
CONFIG = "configs/search_digits.yaml"


def step(
    network: Network, architecture: Any, values: Variables, velocity: PyTree, batch: dict
) -> tuple[Variables, PyTree, jax.Array]:
    """Take a step of SGD with momentum; return (values, velocity, loss)."""

    def loss(parameters: PyTree) -> tuple[jax.Array, PyTree]:
        variables = Variables(parameters, values.statistics)
        scores, statistics = network.apply(architecture, variables, batch["images"], train=True)
        return losses.softmax_cross_entropy(scores, batch["labels"])[0].mean(), statistics

    (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(values.parameters)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradients)
    parameters = jax.tree.map(lambda p, v: p - RATE * v, values.parameters, velocity)
    return Variables(parameters, statistics), velocity, value


def batch_of(shape: Shape, examples: int) -> dict:
    """Return random images, the same in every call."""
    key, size = jax.random.key(0), (examples, shape.image, shape.image, shape.channels)
    labels = jnp.arange(examples) % shape.classes
    return {"images": jax.random.normal(key, size), "labels": labels}


def compiled(network: Network, genotype: Genotype, batch: dict) -> tuple[Callable, float]:
    """Compile the step; return the program and the seconds that it took."""
    started, architecture = time.perf_counter(), network.encode(genotype)
    values = jax.eval_shape(network.init, architecture, jax.random.key(0))
    arguments = (architecture, values, values.parameters, batch)
    jitted = jax.jit(functools.partial(step, network), donate_argnums=(1, 2))
    program = jitted.lower(*arguments).compile()
    return program, time.perf_counter() - started


def start(network: Network, architecture: Any) -> Variables:
    """Draw initial values."""
    return jax.jit(network.init)(architecture, jax.random.key(0))


class Run:
    """Hold a program, its state, and the times of its steps."""

    def __init__(self, program: Callable, architecture: Any, values: Variables) -> None:
        self.program, self.architecture = program, architecture
        self.state = (values, jax.tree.map(jnp.zeros_like, values.parameters))
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def step(self, batch: dict) -> float:
        """Take one step and return its loss."""
        started, cpu = time.perf_counter(), time.process_time()
        *state, loss = self.program(self.architecture, *self.state, batch)
        self.state = tuple(state)
        value = float(loss)
        self.times.append(time.perf_counter() - started)
        self.cpu_times.append(time.process_time() - cpu)
        return value


def compare(shape: Shape, genotypes: list[Genotype], examples: int, steps: int) -> dict:
    """Run `steps` steps of both builders on each of the architectures."""
    interpreter, static, batch = Interpreter(shape), Static(shape), batch_of(shape, examples)
    shared_program, compile_s = compiled(interpreter, genotypes[0], batch)
    rows = []
    for genotype in genotypes:
        architecture = interpreter.encode(genotype)
        values = start(interpreter, architecture)
        # Copies, because each program overwrites its arguments with its results.
        same = jax.tree.map(jnp.copy, to_static(interpreter, genotype, values))
        own_program, own_compile_s = compiled(static, genotype, batch)
        runs = [
            Run(shared_program, architecture, values),
            Run(own_program, static.encode(genotype), same),
        ]
        perturbed = trained_by_both.in_the_last_digit(same)
        control = Run(own_program, static.encode(genotype), perturbed)
        losses_of_both = [[run.step(batch) for run in runs] for _ in range(steps + 1)]
        losses_of_static = [[control.step(batch), loss] for _, loss in losses_of_both]
        seconds = [statistics.median(run.times[1:]) for run in runs]
        cpu_seconds = [statistics.median(run.cpu_times[1:]) for run in runs]
        rows.append(
            {
                "compile_s": own_compile_s,
                "interpreter_ms": 1000 * seconds[0],
                "static_ms": 1000 * seconds[1],
                "ratio": seconds[0] / seconds[1],
                "cpu_ratio": cpu_seconds[0] / cpu_seconds[1],
                "loss_difference": largest_difference(losses_of_both),
                "of_itself": largest_difference(losses_of_static),
            }
        )
        print(*(f"{name} {value:.3g}" for name, value in rows[-1].items()), sep="  ", flush=True)
    return {"compile_s": compile_s, "architectures": rows}


def largest_difference(losses: list[list[float]]) -> float:
    """Return the largest difference of two losses in a step, relative to the second one.

    NaN if a loss is not finite.
    """
    a, b = np.array(losses).T
    return float(np.max(np.abs(a - b) / np.abs(b)))


def tpu_memory(topology: str, shape: Shape, genotypes: list[Genotype], examples: int) -> dict:
    """Return the bytes of temporaries of both builders' steps on one device of a topology."""
    programs = [_exported("interpreter", Interpreter(shape), genotypes[0], examples)]
    for i, genotype in enumerate(genotypes):
        programs.append(_exported(f"static {i}", Static(shape), genotype, examples))
    results = compiler.compile_programs(programs, topologies.parse(topology), show=print)
    return {r.name: (r.temporary_bytes, r.compile_s, r.error) for r in results}


def _exported(name: str, network: Network, genotype: Genotype, examples: int) -> Program:
    architecture = network.encode(genotype)
    values = jax.eval_shape(network.init, architecture, jax.random.key(0))
    batch = jax.eval_shape(functools.partial(batch_of, network.shape, examples))
    # With flat lists of arguments and results, because exports know no types of this package.
    leaves, structure = jax.tree.flatten((architecture, values, values.parameters, batch))

    def flat(*arguments: Any) -> list:
        return jax.tree.leaves(step(network, *jax.tree.unflatten(structure, arguments)))

    exported = jax.export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    first = len(jax.tree.leaves(architecture))
    updated = len(jax.tree.leaves((values, values.parameters)))
    return Program(name, exported, tuple(range(first, first + updated)))


def main() -> int:
    """Print the figures. Exit codes: 0 done, 2 bad input, 1 anything else."""
    options = _options()
    try:
        search = checked(options)
    except (ValueError, OSError, ImportError, errors.CompilerNotInstalledError) as error:
        return messages.fail(error, 2, "benchmark_interpreter.py")
    try:
        figures = measured(search, options)
    except (ArithmeticError, RuntimeError, MemoryError) as error:  # diverged, or out of memory
        return messages.fail(error, 1, "benchmark_interpreter.py")
    if options.json:
        print(json.dumps(figures))
    return 0


def measured(search: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return what the options ask for."""
    machine = f"{platform.machine()}, Python {sys.version.split()[0]}, JAX {jax.__version__}"
    figures: dict[str, Any] = {"machine": machine}
    if options.architectures:
        genotypes = drawn(options.architectures)
        figures |= compare(_shape(options), genotypes, options.batch, options.steps)
        report(figures, options)
    if options.trained:
        numbers = range(options.first, options.first + options.trained)
        rows = trained_by_both.trained_by_both(search, numbers)
        figures["trained"] = {"rows": rows, **trained_by_both.summary(rows)}
        report_trained(figures["trained"], options.trained)
    if options.tpu:
        shape = Shape(
            cells_per_stack=3, filters=24, image=32, channels=3, classes=10, dtype="bfloat16"
        )
        figures["tpu"] = tpu_memory("v5e:2x2", shape, drawn(3), 128)
        for name, (temporary, seconds, error) in figures["tpu"].items():
            print(f"{name}: {temporary / 1e6:.0f} MB, compiled in {seconds:.0f} s {error or ''}")
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells-per-stack", type=int, default=1, help="normal cells (1)")
    parser.add_argument("--filters", type=int, default=8, help="filters of the first stack (8)")
    parser.add_argument("--image", type=int, default=8, help="height and width (8)")
    parser.add_argument("--batch", type=int, default=64, help="examples in a batch (64)")
    parser.add_argument(
        "--architectures", type=int, default=10, help="architectures to compare (10)"
    )
    parser.add_argument("--steps", type=int, default=7, help="steps to time, after a first one (7)")
    parser.add_argument("--trained", type=int, default=20, help="candidates to train (20)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them (0)")
    parser.add_argument("--config", default=CONFIG, help=f"config of their search ({CONFIG})")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace its own")
    parser.add_argument("--tpu", action="store_true", help="v5e memory, N=3, F=24; an hour")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = console.parse(parser)
    minimum = {"batch": 1, "architectures": 0, "steps": 1, "trained": 0, "first": 0}
    for name, least in minimum.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.trained == 1:
        parser.error("--trained 1: expected at least 2, because one cannot be ranked, or 0")
    return options


def checked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the config's search, if candidates are trained; check all options."""
    if options.architectures:
        Static(_shape(options)).encode(*drawn(1))
    if options.tpu:
        libtpu.check_installed()
    if not options.trained and not options.overrides:
        return {}
    config = loader.load_as(SearchConfig, options.config, options.overrides)
    return trained_by_both.arguments(config)


def drawn(count: int) -> list[Genotype]:
    """Draw architectures of the paper's space at random."""
    return [NASNetSpace().random(Random(seed)) for seed in range(count)]


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(options.cells_per_stack, options.filters, options.image, channels=1, classes=10)


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the summary."""
    rows = figures["architectures"]

    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    print(f"compile: interpreter {figures['compile_s']:.0f} s once, else {mean('compile_s'):.0f} s")
    print(
        f"step, interpreter / static: {mean('ratio'):.2f}, processor time {mean('cpu_ratio'):.2f}"
    )
    worst, itself = (  # NaN if one of them is
        np.max([row[name] for row in rows]) for name in ("loss_difference", "of_itself")
    )
    print(
        f"largest relative difference of a loss in {options.steps + 1} steps: {worst:.1e}; of the "
        f"static program from itself {itself:.1e}"
    )


def report_trained(figures: dict[str, Any], count: int) -> None:
    """Print the summary of whole trainings."""
    for builder in BUILDERS:
        results = figures[builder]
        print(
            f"{count} candidates trained, {builder}: mean accuracy {results['fitness']:.4f}, "
            f"{results['per_hour']:.0f} an hour, {results['compilations']} programs compiled; "
            f"without compilations {results['per_hour_without_compiling']:.0f} an hour"
        )
    ratio = figures["interpreter"]["per_hour"] / figures["static"]["per_hour"]
    ranks = figures["rank_correlation"]
    difference, of_itself = (
        "{:.4f} +- {:.4f}".format(*figures[f"difference of {name}"])
        for name in ("interpreter", "itself")
    )
    print(
        f"ratio of candidates per hour {ratio:.1f}; accuracies differ by {difference}, those of "
        f"the static program from itself by {of_itself}; the builders' ranks correlate "
        f"{'undefined' if ranks is None else format(ranks, '.3f')}"
    )


if __name__ == "__main__":
    sys.exit(main())
