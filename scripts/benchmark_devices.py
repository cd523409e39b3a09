"""Compare two ways to train candidates on several devices: a thread for each, and rounds.

    python scripts/benchmark_devices.py                # on 2 simulated devices; minutes
    python scripts/benchmark_devices.py --devices 0    # on the accelerators of this machine
    python scripts/benchmark_devices.py --json         # one JSON object as the last line

`workers="devices"` hands each device's thread its next candidate when it is done with the last, and
compiles for each device. The other way is one program for all of them, by `jax.shard_map` without
collectives, that trains as many candidates as there are devices; none of these has its result, and
no device its next candidate, before the slowest has ended. Both run the same random architectures,
by the interpreter, in turn, so that times are medians, ratios their quotients.
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

EPOCHS, RATE = 3, 0.05


class Candidates:
    """What there is to train: architectures as data, and images."""

    def __init__(self, count: int, filters: int) -> None:
        self.data = Data("digits", examples=512)
        split, space = self.data.split(), NASNetSpace()
        size, channels = split.images.shape[2:]
        shape = Shape(1, filters, size, channels, split.classes)
        self.network = Interpreter(shape, space.operations, space.pairs)
        self.recipe = Recipe(64, 0.9, 5e-4, 0.0, source("digits").augmentation)
        drawn = [space.random(Random(seed)) for seed in range(count)]
        self.architectures = [self.network.encode(genotype) for genotype in drawn]
        steps = np.float32(EPOCHS * (512 // 64))
        self.scalars = [
            Scalars(np.uint32(i), np.float32(RATE), np.float32(8), steps) for i in range(count)
        ]

    def in_threads(self, devices: list[Any]) -> list[float]:
        """The losses of the last epochs."""
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
        """The loss of the last epoch of one candidate, on this thread's device."""
        architecture, scalars = self.architectures[i], self.scalars[i]
        made, _ = programs.get(self.network, self.recipe, architecture, self.data)
        state, _ = made.start(architecture, scalars.seed)
        loss = np.nan
        for _ in range(EPOCHS):
            state, loss = made.epoch(
                state, architecture, scalars, made.split.images, made.split.labels
            )
            loss = float(loss)
        return loss

    def in_rounds(self, devices: list[Any]) -> Callable[[], list[float]]:
        """A function that returns the same losses."""
        mesh, split = Mesh(np.array(devices), ("candidate",)), self.data.split()
        one, all_ = P("candidate"), P()
        images, labels = jax.device_put(split[:2], NamedSharding(mesh, all_))
        start = _rounds(
            functools.partial(programs.start, self.network, self.recipe), mesh, (one, one)
        )
        specs = (one, one, one, all_, all_)
        epoch = _rounds(functools.partial(programs.epoch, self.network, self.recipe), mesh, specs)

        def run() -> list[float]:
            losses = []
            for first in range(0, len(self.scalars), len(devices)):
                these = slice(first, first + len(devices))
                architectures = _stack(self.architectures[these])
                scalars = _stack(self.scalars[these])
                state, _ = start(architectures, scalars.seed)
                loss = np.array([])
                for _ in range(EPOCHS):
                    state, loss = epoch(state, architectures, scalars, images, labels)
                    loss = np.asarray(loss)
                losses += loss.tolist()
            return losses

        return run


def _rounds(function: Callable, mesh: Mesh, specs: tuple) -> Any:
    """The function of one candidate as that of one on each device."""

    def body(*arguments: Any) -> Any:
        pairs = zip(arguments, specs, strict=True)
        own = [a if spec == P() else jax.tree.map(lambda x: x[0], a) for a, spec in pairs]
        return jax.tree.map(lambda x: x[None], function(*own))

    out = P("candidate")
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: np.stack(a), *trees)


def compare(candidates: Candidates, devices: list[Any], repetitions: int) -> dict[str, Any]:
    """By way, seconds of the first time, with compilations, and of others; how losses differ."""
    ways = {
        "threads": functools.partial(candidates.in_threads, devices),
        "rounds": candidates.in_rounds(devices),
        "one device": functools.partial(candidates.in_threads, devices[:1]),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    apart = 0.0
    for _ in range(1 + repetitions):
        losses = {}
        for way, run in ways.items():
            begun = time.perf_counter()
            losses[way] = run()
            times[way].append(time.perf_counter() - begun)
        a, b = np.array(losses["rounds"]), np.array(losses["threads"])
        apart = float(np.max([apart, *np.abs(a / b - 1)]))
    found: dict[str, Any] = {
        way: {"first_s": first, "s": statistics.median(rest)}
        for way, (first, *rest) in times.items()
    }
    return {**found, "loss_difference": apart}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=2, help="to simulate, 0 for real ones (2)")
    parser.add_argument("--candidates", type=int, default=12, help="a multiple of devices (12)")
    parser.add_argument("--filters", type=int, default=4, help="of the first stack (4)")
    parser.add_argument("--repetitions", type=int, default=5, help="to time, after a first (5)")
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
    found = compare(Candidates(options.candidates, options.filters), devices, options.repetitions)
    apart = found.pop("loss_difference")
    for way, figures in found.items():
        print(f"{way}: {figures['s']:.2f} s, the first time {figures['first_s']:.0f} s")
    ratio = found["rounds"]["s"] / found["threads"]["s"]
    print(f"{len(devices)} devices, {options.candidates} candidates: rounds / threads {ratio:.2f}")
    print(f"largest relative difference of a candidate's last loss between these two: {apart:.1e}")
    if options.json:
        machine = (
            f"Python {sys.version.split()[0]}, JAX {jax.__version__}, {devices[0].device_kind}"
        )
        print(json.dumps({"machine": machine, "loss_difference": apart, **found}))


if __name__ == "__main__":
    main()
