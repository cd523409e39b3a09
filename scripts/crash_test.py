"""Kill training runs at random instants, resume them, and compare with uninterrupted runs.

    python scripts/crash_test.py --kills 20          # about ten minutes on two cores
    python scripts/crash_test.py --kills 4 --json    # with one JSON object as the last line

Two small runs on simulated CPU devices share the kills: a residual network with batch norm, shifted
images and a moving average on the digits, and a Transformer with dropout on text. Each is killed
(SIGKILL) while it starts, compiles, trains, saves or evaluates, and resumed with the same command.
After each kill the next checkpoint, and at the end the last one, must be bitwise that of an
uninterrupted run. The metrics must be equal, and occur once each. JSON keys: kills, identical (the
number after which everything was), lost_steps_max (the most steps that a kill lost).
"""

import argparse
import json
import os
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

SAVE_EVERY, EVAL_EVERY, STEPS_PER_KILL = 10, 15, 40
MODELS = {
    "digits": """
model: {kind: resnet, depths: [1], width: 4, stem: small, classes: 10, in_channels: 1}
data: {kind: digits, batch_size: 32, shift: 1}
optimizer: {kind: adamw, learning_rate: 3e-3, ema: 0.9}
""",
    "text": """
model: {kind: transformer_lm, length: 16, width: 16, heads: 2, feed_forward: 32, layers: 2,
        dropout: 0.1}
data: {kind: text, source: topics, batch_size: 32, test_fraction: 0.01}
optimizer: {kind: adamw, learning_rate: 3e-3, clip_norm: 1.0}
""",
}
REST = """
mesh: {{stages: 2, data: 2, simulate: 4}}
pipeline: {{micro_batches: 4}}
train: {{steps: {steps}, save_every: {save}, eval_every: {evaluate}, log_every: 1, keep: {keep}}}
"""


class Kill(NamedTuple):
    """Hold one kill and its outcome."""

    run: str
    instant: str
    done: int  # the last step that was completed
    resumed: int = 0  # the step from which the run resumed
    identical: bool = False

    @property
    def lost(self) -> int:
        """Return the number of steps that had to be repeated."""
        return max(self.done - self.resumed, 0)


class Process:
    """Run `gpipe train`, and follow its progress by its output."""

    def __init__(self, config: Path, workdir: Path, **options: str) -> None:
        self.workdir, self.step, self.first, self.evaluating = workdir, 0, None, False
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # Every start compiles the same programs, which is not tested here.
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TPU_SKIP_MDS_QUERY": "1",
        }
        command = [
            sys.executable,
            "-m",
            "gpipe_jax",
            "train",
            str(config),
            f"train.workdir={workdir}",
        ]
        command += [f"train.{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, step: int, limit_s: float) -> bool:
        """Return whether `step` is done within the limit; False if the process has ended."""
        deadline = time.monotonic() + limit_s
        while self.step < step:
            try:
                line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                return False
            if line is None:
                return False
            self._note(line)
        return True

    def _note(self, line: str) -> None:
        match = re.match(r"step (\d+)/", line)
        if match and "test_loss" not in line:
            self.step = int(match[1])
            self.first = self.first or self.step
            self.evaluating = self.step % EVAL_EVERY == 0
        elif match:
            self.evaluating = False

    def instant(self) -> str:
        """Return what the process is doing, as far as its output and files show."""
        while not self.lines.empty():
            line = self.lines.get()
            if line is not None:
                self._note(line)
        saving = any(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        if not self.first:
            return "start, compile"
        if saving:
            return "save"
        return "evaluation" if self.evaluating else "step"

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.wait()

    def finish(self) -> None:
        """Wait for the end of the run; fail unless its exit code is 0."""
        self.wait_for(10**9, 600)
        if self.process.wait(timeout=60):
            raise SystemExit(f"{self.workdir} ended with {self.process.returncode}")


def layers(workdir: Path, step: int) -> dict[str, bytes]:
    """Return the files of a checkpoint: everything that training changes."""
    folder = workdir / "checkpoints" / str(step) / "state"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def metrics(workdir: Path) -> list[dict]:
    """Return the records of a run, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


def newest(workdir: Path, after: int = -1) -> int | None:
    """Return the step of the newest complete checkpoint."""
    names = (path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
    return max((int(name) for name in names if int(name) > after), default=None)


def crash(name: str, config: Path, folder: Path, kills: int, rng: random.Random) -> list[Kill]:
    """Kill one run `kills` times, then let it end."""
    whole, workdir = folder / f"{name}-whole", folder / f"{name}-killed"
    Process(config, whole, keep="100000").finish()
    done: list[Kill] = []
    for number in range(kills + 1):
        process = Process(config, workdir)
        # Kill it while it starts, or after some steps and a fraction of a step.
        early = number == 1 or rng.random() < 0.15
        goal = 1 if early else (number * STEPS_PER_KILL + rng.randrange(1, STEPS_PER_KILL))
        if number == kills:
            process.finish()
        elif early:
            process.wait_for(goal, rng.uniform(0.5, 6))
        else:
            process.wait_for(goal, 600)
            time.sleep(rng.uniform(0, 0.1))
        instant = process.instant()
        process.kill()
        if done:
            done[-1] = judge(done[-1], process, whole)
        if number < kills:
            done.append(Kill(name, instant, max(process.step, newest(workdir) or 0)))
    same = metrics(workdir) == metrics(whole)
    last = layers(whole, newest(whole) or 0) == layers(workdir, newest(workdir) or 0)
    return [kill._replace(identical=kill.identical and same and last) for kill in done]


def judge(kill: Kill, process: Process, whole: Path) -> Kill:
    """Return the kill with the outcome of the next start."""
    step = newest(process.workdir) or 0
    same = step == 0 or layers(process.workdir, step) == layers(whole, step) != {}
    resumed = process.first - 1 if process.first else min(step, kill.done)
    return kill._replace(resumed=resumed, identical=same)


def main() -> int:
    """Print a table of instants and outcomes; 0 if all were identical."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    options = parser.parse_args()
    rng, outcomes = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, model) in enumerate(MODELS.items()):
            kills = (options.kills + 1 - i) // 2
            config = Path(folder) / f"{name}.yaml"
            steps = STEPS_PER_KILL * (kills + 1)
            rest = REST.format(steps=steps, save=SAVE_EVERY, evaluate=EVAL_EVERY, keep=2)
            config.write_text(model + rest)
            outcomes += crash(name, config, Path(folder), kills, rng) if kills else []
    print(f"{'run':8}{'killed during':16}{'done':>6}{'resumed from':>14}{'lost':>6}  identical")
    for kill in outcomes:
        print(
            f"{kill.run:8}{kill.instant:16}{kill.done:>6}{kill.resumed:>14}{kill.lost:>6}  "
            f"{'yes' if kill.identical else 'NO'}"
        )
    figures = {
        "kills": len(outcomes),
        "identical": sum(kill.identical for kill in outcomes),
        "lost_steps_max": max((kill.lost for kill in outcomes), default=0),
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    if options.json:
        print(json.dumps(figures))
    return 0 if figures["identical"] == figures["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
