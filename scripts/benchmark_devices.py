"""Compare two ways to train candidates on several devices: a thread for each, and rounds.

    python scripts/benchmark_devices.py                # on 2 simulated devices; minutes
    python scripts/benchmark_devices.py --devices 0    # on the accelerators of this machine
    python scripts/benchmark_devices.py --json         # one JSON object as the last line

With `workers="devices"` each device has a thread, which takes its next candidate when it is done
with the last one. JAX compiles for each device. The other way is rounds: one program for all
devices (`jax.shard_map` without collectives) trains as many candidates as there are devices. No
result is known, and no device continues, before the slowest candidate of a round ends. Both ways
train the same random architectures with the interpreter. They take turns; times are medians, and
ratios are quotients of medians.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from random import Random
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gpipe_jax
from nas.spaces.nasnet import NASNetSpace
from nas.training import programs
from nas.training.datasets import Data, source
from nas.training.interpreter.network import Interpreter
from nas.training.network import Shape
from nas.training.recipe import Recipe, Scalars

EPOCHS, LEARNING_RATE, EXAMPLES = 3, 0.05, 512


class Candidates:
    """Train random architectures in either way."""

    def __init__(self, count: int, filters: int) -> None:
        self.data = Data("digits", examples=EXAMPLES)
        split, space = self.data.split(), NASNetSpace()
        size, channels = split.images.shape[2:]
        shape = Shape(1, filters, size, channels, split.classes)
        self.network = Interpreter(shape, space.operations, space.pairs)
        self.recipe = Recipe(64, 0.9, 5e-4, 0.0, source("digits").augmentation)
        drawn = [space.random(Random(seed)) for seed in range(count)]
        self.architectures = [self.network.encode(genotype) for genotype in drawn]
        steps = np.float32(EPOCHS * (EXAMPLES // 64))
        rate, warmup_steps = np.float32(LEARNING_RATE), np.float32(8)
        self.scalars = [Scalars(np.uint32(i), rate, warmup_steps, steps) for i in range(count)]

    def in_threads(self, devices: list[Any]) -> list[float]:
        """Train with a thread for each device; return the losses of the last epoch."""
        free: SimpleQueue[Any] = SimpleQueue()
        for device in devices:
            free.put(device)

        def train(i: int) -> float:
            device = free.get()
            try:
                with jax.default_device(device):
                    return self.alone(i)
            finally:
                free.put(device)

        with ThreadPoolExecutor(len(devices)) as pool:
            return list(pool.map(train, range(len(self.scalars))))

    def alone(self, i: int) -> float:
        """Train candidate i on this thread's device; return the loss of its last epoch."""
        architecture, scalars = self.architectures[i], self.scalars[i]
        compiled, _ = programs.get(self.network, self.recipe, architecture, self.data)
        state, _ = compiled.start(architecture, scalars.seed)
        loss = np.nan
        for _ in range(EPOCHS):
            state, loss = compiled.epoch(
                state, architecture, scalars, compiled.split.images, compiled.split.labels
            )
            loss = float(loss)
        return loss

    def in_rounds(self, devices: list[Any]) -> Callable[[], list[float]]:
        """Compile the rounds; return a function that trains and returns the same losses."""
        mesh, split = Mesh(np.array(devices), ("candidate",)), self.data.split()
        split_spec, same_spec = P("candidate"), P()
        images, labels = jax.device_put(split[:2], NamedSharding(mesh, same_spec))
        start = _rounds(
            functools.partial(programs.start, self.network, self.recipe),
            mesh,
            (split_spec, split_spec),
        )
        specs = (*[split_spec] * 3, *[same_spec] * 2)
        epoch = _rounds(functools.partial(programs.epoch, self.network, self.recipe), mesh, specs)

        def run() -> list[float]:
            losses = []
            for first in range(0, len(self.scalars), len(devices)):
                members = slice(first, first + len(devices))
                architectures = _stack(self.architectures[members])
                scalars = _stack(self.scalars[members])
                state, _ = start(architectures, scalars.seed)
                loss = np.array([])
                for _ in range(EPOCHS):
                    state, loss = epoch(state, architectures, scalars, images, labels)
                    loss = np.asarray(loss)
                losses += loss.tolist()
            return losses

        return run


def _rounds(function: Callable, mesh: Mesh, specs: tuple) -> Any:
    """Turn a function of one candidate into one of a candidate on each device."""

    def body(*arguments: Any) -> Any:
        pairs = zip(arguments, specs, strict=True)
        local = [a if spec == P() else jax.tree.map(lambda x: x[0], a) for a, spec in pairs]
        return jax.tree.map(lambda x: x[None], function(*local))

    out = P("candidate")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: np.stack(a), *trees)


def compare(candidates: Candidates, devices: list[Any], repetitions: int) -> dict[str, Any]:
    """Return for each way the seconds of the first time, with compilation, and of later times.

    `loss_difference` is the largest relative difference of a candidate's losses.
    """
    ways = {
        "threads": functools.partial(candidates.in_threads, devices),
        "rounds": candidates.in_rounds(devices),
        "one device": functools.partial(candidates.in_threads, devices[:1]),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    difference = 0.0
    for _ in range(1 + repetitions):
        losses = {}
        for way, run in ways.items():
            started = time.perf_counter()
            losses[way] = run()
            times[way].append(time.perf_counter() - started)
        a, b = np.array(losses["rounds"]), np.array(losses["threads"])
        difference = float(np.max([difference, *np.abs(a / b - 1)]))
    seconds: dict[str, Any] = {
        way: {"first_s": first, "s": statistics.median(rest)}
        for way, (first, *rest) in times.items()
    }
    return {**seconds, "loss_difference": difference}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", type=int, default=2, help="devices to simulate, 0 for real ones (2)"
    )
    parser.add_argument(
        "--candidates", type=int, default=12, help="candidates, a multiple of devices (12)"
    )
    parser.add_argument("--filters", type=int, default=4, help="filters of the first stack (4)")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="times to measure, after a first (5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    for name, least in (("devices", 0), ("candidates", 1), ("filters", 1), ("repetitions", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.devices:
        gpipe_jax.simulate_devices(options.devices)
    devices = jax.local_devices()
    if options.candidates % len(devices):
        parser.error(
            f"--candidates {options.candidates}: expected a multiple of the {len(devices)} devices"
        )
    results = compare(Candidates(options.candidates, options.filters), devices, options.repetitions)
    difference = results.pop("loss_difference")
    for way, figures in results.items():
        print(f"{way}: {figures['s']:.2f} s, the first time {figures['first_s']:.0f} s")
    ratio = results["rounds"]["s"] / results["threads"]["s"]
    print(f"{len(devices)} devices, {options.candidates} candidates: rounds / threads {ratio:.2f}")
    print(
        "largest relative difference of a candidate's last loss between these two: "
        f"{difference:.1e}"
    )
    if options.json:
        machine = (
            f"Python {sys.version.split()[0]}, JAX {jax.__version__}, {devices[0].device_kind}"
        )
        print(json.dumps({"machine": machine, "loss_difference": difference, **results}))


if __name__ == "__main__":
    main()
