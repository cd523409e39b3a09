"""Measure what saving costs: time of a step, saving every ten steps, over not saving.

    python scripts/benchmark_save.py                       # configs/digits.yaml, a few minutes
    python scripts/benchmark_save.py configs/text.yaml --steps 50 --json

It alternates runs of one compiled program with checkpoints every ten steps and without. A run is
timed from its eleventh step to the end of its last, including saves and waits for them; the ratio
is that of the medians. On simulated CPU devices, writing and training share the cores, so the
ratio of processor time is printed too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from etils import epath

from gpipe_jax.config import loader
from gpipe_jax.training import from_config, run
from gpipe_jax.training.from_config import Assembly

WARM_UP = 10


def step_times_s(
    assembly: Assembly, steps: int, save_every: int, folder: Path
) -> tuple[float, float]:
    """Return the mean time of a step of one run, and its processor time."""
    settings = {"steps": steps, "save_every": save_every, "eval_every": 10**6}
    train = assembly.config.train.model_copy(update=settings)
    config = assembly.config.model_copy(update={"train": train})
    started: list[tuple[float, float]] = []

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def show(record: dict) -> None:
        if record["step"] == WARM_UP:
            started.append(now())

    run.train(assembly._replace(config=config, workdir=epath.Path(folder)), show)
    wall_s, processor_s = (b - a for a, b in zip(started[0], now(), strict=True))
    return wall_s / (steps - WARM_UP), processor_s / (steps - WARM_UP)


def main() -> int:
    """Print the two times and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/digits.yaml")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    options = parser.parse_args()
    for name, least in (("steps", WARM_UP + 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    assembly = from_config.assemble(loader.load(options.config), "unused")
    times: dict[str, list[tuple[float, float]]] = {"saving": [], "not saving": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):  # the first round compiles
            for name, every in (("saving", 10), ("not saving", 10**6)):
                path = Path(folder) / f"{name} {number}"
                times[name].append(step_times_s(assembly, options.steps, every, path))
    figures = {}
    for i, kind in enumerate(("wall", "processor")):
        medians = {name: statistics.median(t[i] for t in runs[1:]) for name, runs in times.items()}
        ratio = figures[f"ratio_{kind}"] = medians["saving"] / medians["not saving"]
        saving, plain = medians.values()
        print(f"{kind} time of a step: {saving:.4f} s saving, {plain:.4f} s not: {ratio:.3f}")
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
