"""Compare the two builders of a search's networks: one program for all, and one for each.

    python scripts/benchmark_interpreter.py               # equality, times, candidates per hour
    python scripts/benchmark_interpreter.py --image 32    # of steps on larger images
    python scripts/benchmark_interpreter.py --tpu         # memory too, by the compiler for TPU v5e
    python scripts/benchmark_interpreter.py --json        # one JSON object as the last line

Architectures are drawn at random, with seeds 0, 1, ... Both programs are of one training step, and
train from the same values, on one batch, for --steps steps after a first that is not timed: in
turn, so that times are medians, ratios their quotients. The difference of their losses is the
largest of all steps, relative to the loss. Beside it, as such training is chaotic, stands the same
of the static program and itself, from values that differ in the last digit.

Then candidates of a search (--config) are trained to the end by both builders in turn, from the
same values, and by the static program again from values that differ in the last digit. The whole of
each evaluation counts for the candidates per hour, compilations too; in a longer search the
interpreter's one compilation weighs less.
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
from gpipe_jax.utils import console
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
    """(values, velocity, loss) after a step of SGD with momentum."""

    def loss(parameters: PyTree) -> tuple[jax.Array, PyTree]:
        both = Variables(parameters, values.statistics)
        scores, new = network.apply(architecture, both, batch["images"], train=True)
        return losses.softmax_cross_entropy(scores, batch["labels"])[0].mean(), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(values.parameters)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradients)
    parameters = jax.tree.map(lambda p, v: p - RATE * v, values.parameters, velocity)
    return Variables(parameters, new), velocity, value


def batch_of(shape: Shape, examples: int) -> dict:
    """Random images, which are the same for all."""
    key, size = jax.random.key(0), (examples, shape.image, shape.image, shape.channels)
    labels = jnp.arange(examples) % shape.classes
    return {"images": jax.random.normal(key, size), "labels": labels}


def compiled(network: Network, genotype: Genotype, batch: dict) -> tuple[Callable, float]:
    """The step as a program, and the seconds of making it."""
    began, architecture = time.perf_counter(), network.encode(genotype)
    values = jax.eval_shape(network.init, architecture, jax.random.key(0))
    arguments = (architecture, values, values.parameters, batch)
    jitted = jax.jit(functools.partial(step, network), donate_argnums=(1, 2))
    program = jitted.lower(*arguments).compile()
    return program, time.perf_counter() - began


def start(network: Network, architecture: Any) -> Variables:
    """Initial values."""
    return jax.jit(network.init)(architecture, jax.random.key(0))


class Run:
    """A program and its state."""

    def __init__(self, program: Callable, architecture: Any, values: Variables) -> None:
        self.program, self.architecture = program, architecture
        self.state = (values, jax.tree.map(jnp.zeros_like, values.parameters))
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def step(self, batch: dict) -> float:
        """The loss of one more step."""
        began, cpu = time.perf_counter(), time.process_time()
        *state, loss = self.program(self.architecture, *self.state, batch)
        self.state = tuple(state)
        value = float(loss)
        self.times.append(time.perf_counter() - began)
        self.cpu_times.append(time.process_time() - cpu)
        return value


def compare(shape: Shape, genotypes: list[Genotype], examples: int, steps: int) -> dict:
    """Both builders on each of the architectures, for so many steps."""
    interpreter, static, batch = Interpreter(shape), Static(shape), batch_of(shape, examples)
    one, compile_s = compiled(interpreter, genotypes[0], batch)
    rows = []
    for genotype in genotypes:
        architecture = interpreter.encode(genotype)
        values = start(interpreter, architecture)
        # Copies, as each program takes what it is given for its results.
        same = jax.tree.map(jnp.copy, to_static(interpreter, genotype, values))
        other, own_compile_s = compiled(static, genotype, batch)
        runs = [Run(one, architecture, values), Run(other, static.encode(genotype), same)]
        moved = Run(other, static.encode(genotype), trained_by_both.in_the_last_digit(same))
        found = [[run.step(batch) for run in runs] for _ in range(steps + 1)]
        again = [[moved.step(batch), loss[1]] for loss in found]
        middle = [statistics.median(run.times[1:]) for run in runs]
        cpu = [statistics.median(run.cpu_times[1:]) for run in runs]
        rows.append(
            {
                "compile_s": own_compile_s,
                "interpreter_ms": 1000 * middle[0],
                "static_ms": 1000 * middle[1],
                "ratio": middle[0] / middle[1],
                "cpu_ratio": cpu[0] / cpu[1],
                "loss_difference": largest_difference(found),
                "of_itself": largest_difference(again),
            }
        )
        print(*(f"{name} {value:.3g}" for name, value in rows[-1].items()), sep="  ", flush=True)
    return {"compile_s": compile_s, "architectures": rows}


def largest_difference(losses: list[list[float]]) -> float:
    """Of (interpreter, static) in any step, relative to the second; NaN if one is not finite."""
    one, other = np.array(losses).T
    return float(np.max(np.abs(one - other) / np.abs(other)))


def tpu_memory(topology: str, shape: Shape, genotypes: list[Genotype], examples: int) -> dict:
    """Bytes of temporaries of both builders' steps on one device of a topology."""
    programs = [_exported("interpreter", Interpreter(shape), genotypes[0], examples)]
    for i, genotype in enumerate(genotypes):
        programs.append(_exported(f"static {i}", Static(shape), genotype, examples))
    results = compiler.compile_programs(programs, topologies.parse(topology), show=print)
    return {r.name: (r.temporary_bytes, r.compile_s, r.error) for r in results}


def _exported(name: str, network: Network, genotype: Genotype, examples: int) -> Program:
    architecture = network.encode(genotype)
    values = jax.eval_shape(network.init, architecture, jax.random.key(0))
    batch = jax.eval_shape(functools.partial(batch_of, network.shape, examples))
    # From a flat list of arguments: an exported program knows no types of ours.
    leaves, structure = jax.tree.flatten((architecture, values, values.parameters, batch))
    flat = lambda *a: jax.tree.leaves(step(network, *jax.tree.unflatten(structure, a)))  # noqa: E731
    exported = jax.export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    first = len(jax.tree.leaves(architecture))
    updated = len(jax.tree.leaves((values, values.parameters)))
    return Program(name, exported, tuple(range(first, first + updated)))


def main() -> int:
    """Print the figures. Exit codes: 0 done, 2 bad input, 1 anything else."""
    options = _options()
    try:
        given = checked(options)
    except (ValueError, OSError, ImportError, errors.CompilerNotInstalledError) as error:
        return console.fail(error, 2, "benchmark_interpreter.py")
    try:
        figures = measured(given, options)
    # It diverges, or memory is short.
    except (ArithmeticError, RuntimeError, MemoryError) as error:
        return console.fail(error, 1, "benchmark_interpreter.py")
    if options.json:
        print(json.dumps(figures))
    return 0


def measured(given: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """All that is asked for, which is printed too."""
    machine = f"{platform.machine()}, Python {sys.version.split()[0]}, JAX {jax.__version__}"
    figures: dict[str, Any] = {"machine": machine}
    if options.architectures:
        found = compare(_shape(options), drawn(options.architectures), options.batch, options.steps)
        figures |= found
        report(figures, options)
    if options.trained:
        numbers = range(options.first, options.first + options.trained)
        rows = trained_by_both.trained_by_both(given, numbers)
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
    parser.add_argument("--cells", type=int, default=1, help="normal cells in a stack (1)")
    parser.add_argument("--filters", type=int, default=8, help="of the first stack (8)")
    parser.add_argument("--image", type=int, default=8, help="height and width (8)")
    parser.add_argument("--batch", type=int, default=64, help="examples (64)")
    parser.add_argument("--architectures", type=int, default=10, help="to compare (10)")
    parser.add_argument("--steps", type=int, default=7, help="to time, after a first (7)")
    parser.add_argument("--trained", type=int, default=20, help="to train to the end (20)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them (0)")
    parser.add_argument("--config", default=CONFIG, help=f"of that search ({CONFIG})")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="values that replace its own")
    parser.add_argument("--tpu", action="store_true", help="v5e memory, N=3, F=24; an hour")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = console.parse(parser)
    least_of = {"batch": 1, "architectures": 0, "steps": 1, "trained": 0, "first": 0}
    for name, least in least_of.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.trained == 1:
        parser.error("--trained 1: expected at least 2, which can be ranked, or 0")
    return options


def checked(options: argparse.Namespace) -> dict[str, Any]:
    """What the search of the config is, if that is trained; an error is raised now, not later."""
    if options.architectures:
        Static(_shape(options)).encode(*drawn(1))
    if options.tpu:
        libtpu.check_installed()
    if not options.trained and not options.overrides:
        return {}
    config = loader.load_as(SearchConfig, options.config, options.overrides)
    return trained_by_both.arguments(config)


def drawn(count: int) -> list[Genotype]:
    """So many of the paper's space, at random."""
    return [NASNetSpace().random(Random(seed)) for seed in range(count)]


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(options.cells, options.filters, options.image, channels=1, classes=10)


def report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the summary."""
    rows = figures["architectures"]
    mean = lambda name: statistics.mean(row[name] for row in rows)  # noqa: E731
    print(f"compile: interpreter {figures['compile_s']:.0f} s once, else {mean('compile_s'):.0f} s")
    print(
        f"step, interpreter / static: {mean('ratio'):.2f}, processor time {mean('cpu_ratio'):.2f}"
    )
    # NaN if there is one.
    worst, itself = (
        np.max([row[name] for row in rows]) for name in ("loss_difference", "of_itself")
    )
    print(
        f"largest relative difference of a loss in {options.steps + 1} steps: {worst:.1e}; of the "
        f"static program from itself {itself:.1e}"
    )


def report_trained(figures: dict[str, Any], count: int) -> None:
    """Print what came of whole trainings."""
    for builder in BUILDERS:
        found = figures[builder]
        print(
            f"{count} candidates trained, {builder}: mean accuracy {found['fitness']:.4f}, "
            f"{found['per_hour']:.0f} an hour, {found['compilations']} programs compiled; "
            f"without compilations {found['per_hour_without_compiling']:.0f} an hour"
        )
    ratio = figures["interpreter"]["per_hour"] / figures["static"]["per_hour"]
    ranks = figures["rank_correlation"]
    apart, of_itself = (
        "{:.4f} +- {:.4f}".format(*figures[f"difference of {name}"])
        for name in ("interpreter", "itself")
    )
    print(
        f"ratio of candidates per hour {ratio:.1f}; accuracies differ by {apart}, those of the "
        f"static program from itself by {of_itself}; the builders' ranks correlate "
        f"{'undefined' if ranks is None else format(ranks, '.3f')}"
    )


if __name__ == "__main__":
    sys.exit(main())
