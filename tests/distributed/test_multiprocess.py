"""Run several processes as one: the same numbers and checkpoints; and one of them dies."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import REPOSITORY
from ports import free_port

from gpipe_jax.distributed import cluster
from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.errors import ArgumentError

CONFIG = """\
model: {kind: mlp, features: [64, 12, 12, 10]}
data: {kind: digits, batch_size: 24}
mesh: {stages: 2, data: 2, simulate: 4}
pipeline: {micro_batches: 2}
optimizer: {kind: adamw, learning_rate: 0.01, ema: 0.9}
train: {steps: 20, eval_every: 10, log_every: 1}
"""
ENDLESS = "train.steps=1000000"


class Process:
    """Run `gpipe train` in a child process, as one of `count`."""

    def __init__(self, folder: Path, count: int, index: int, port: int, *overrides: str) -> None:
        command = [
            sys.executable, "-m", "gpipe_jax", "train", str(folder / "c.yaml"),
            f"train.workdir={folder / f'{count} processes'}", *overrides,
        ]  # fmt: skip
        command += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        paths = f"{REPOSITORY}{os.pathsep}{folder}"  # a test may write sitecustomize.py
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        environment["PYTHONFAULTHANDLER"] = "1"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)

    def wait_for(self, text: str) -> None:
        while (line := self._new.get(timeout=240)) is not None:
            if text in line:
                return
        raise AssertionError(f"never printed {text!r}: {self.output}")

    @property
    def output(self) -> str:
        return "".join(self.lines)


@pytest.fixture
def start(tmp_path):
    """Provide `start(count, *overrides)`: processes of one run, killed at the end of the test."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    started: list[Process] = []

    def run(count: int, *overrides: str) -> list[Process]:
        port = free_port()
        processes = [Process(tmp_path, count, i, port, *overrides) for i in range(count)]
        started.extend(processes)
        return processes

    yield run
    for each in started:
        each.process.kill()  # SIGTERM does not end a process that jax.distributed connected
        each.process.wait()


def codes(processes: list[Process], timeout_s: float = 240) -> list[int]:
    """Wait for the exit codes; if that takes too long, fail with what each process was doing."""
    deadline = time.monotonic() + timeout_s
    try:
        return [p.process.wait(timeout=max(deadline - time.monotonic(), 1)) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.process.send_signal(signal.SIGABRT)  # faulthandler prints the stack of each thread
            p.process.wait()
        time.sleep(1)  # until their output is read
        pytest.fail("\n\n".join(p.output for p in processes))


def files(workdir: Path, step: int) -> dict[str, bytes]:
    folder = workdir / "checkpoints" / str(step) / "state"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(workdir: Path) -> list[float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r.get("loss", r.get("test_loss")) for r in records]


def check_equal_to_one(start, folder: Path, count: int, *overrides: str) -> list[Process]:
    several, single = start(count, *overrides), start(1, *overrides)
    assert codes(several + single) == [0] * (count + 1), several[0].output + several[1].output
    expected, actual = folder / "1 processes", folder / f"{count} processes"
    assert len(losses(expected)) == 22
    assert losses(actual) == pytest.approx(losses(expected), abs=1e-6)
    assert len(files(expected, 20)) >= 4 and files(actual, 20) == files(expected, 20)
    names = {path.name for path in actual.iterdir()}
    written = {"config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "lock", "run.json"}
    assert names == written
    return several


def test_two_processes_equal_one(start, tmp_path):
    """Give each one stage; then give each a replica, which reads its half of every batch."""
    first, second = check_equal_to_one(start, tmp_path, 2)
    assert "step 20/20" in first.output and "step 20/20" not in second.output
    assert "host 2 of 2, waiting for the others (time-out 300 s)" in second.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "overrides"),
    [
        (2, ["mesh.stages=1", "mesh.simulate=2"]),
        (2, ["pipeline.schedule=interleaved", "pipeline.chunks=1", "data.shift=2"]),
        (4, []),
        (4, ["mesh.stages=4", "model.features=[64, 12, 12, 12, 12, 10]", "mesh.data=1"]),
    ],
)
def test_several_processes_equal_one(start, tmp_path, count, overrides):
    check_equal_to_one(start, tmp_path, count, *overrides)


@pytest.mark.slow
def test_all_use_the_times_of_the_first(start, tmp_path):
    """Share the times of process 0: with its own, process 1 would balance otherwise."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
from gpipe_jax.partition import costs
times = iter([9.0, 1.0, 1.0] if "--process=1" in sys.argv else [1.0, 1.0, 9.0])
costs._measured_time = lambda program, specs: next(times)
""")
    check_equal_to_one(start, tmp_path, 2, "pipeline.cost=time")


@pytest.mark.slow
def test_preempted_in_an_evaluation(start, tmp_path):
    """Send SIGTERM to one: both leave the evaluation, and save the step before it."""
    (tmp_path / "sitecustomize.py").write_text("""
import time
from gpipe_jax.training.trainer import Trainer
whole = Trainer.evaluate
def slow(self, state, batches):
    def slowly():
        for batch in batches:
            print("evaluating", flush=True)
            time.sleep(1)
            yield batch
    return whole(self, state, slowly())
Trainer.evaluate = slow
""")
    first, second = both = start(2, ENDLESS)
    first.wait_for("evaluating")
    second.process.send_signal(signal.SIGTERM)
    assert codes(both, 120) == [75, 75], first.output + second.output
    assert all("stopped after step 10, which is saved" in each.output for each in both)
    assert (
        len(files(tmp_path / "2 processes", 10)) == 4
        and len(losses(tmp_path / "2 processes")) == 10
    )


def test_preempted_then_one_is_killed(start, tmp_path):
    """Send SIGTERM to one: both save the same step. Kill one: the other names it, and exits."""
    first, second = both = start(2, ENDLESS)
    first.wait_for("step 10/")
    second.process.send_signal(signal.SIGTERM)
    assert codes(both, 120) == [75, 75], first.output + second.output
    steps = [p.output.split("stopped after step ")[1].split(",")[0] for p in both]
    assert steps[0] == steps[1] and len(files(tmp_path / "2 processes", int(steps[0]))) == 4
    first, second = both = start(2, ENDLESS)
    first.wait_for(f"step {int(steps[0]) + 10 - int(steps[0]) % 10}/")  # it resumes
    second.process.kill()
    start_s = time.monotonic()
    assert codes([first], 120) == [1] and time.monotonic() - start_s < 60
    assert (
        f"host 2 of 2 ({socket.gethostname()}) has disconnected; host 1 of 2 exits too"
        in first.output
    )
    assert "Traceback" not in first.output


@pytest.mark.slow
def test_the_first_of_three_is_killed(start):
    first, *others = start(3, ENDLESS, "mesh.stages=3", "mesh.data=1", "mesh.simulate=3")
    first.wait_for("step 10/")
    first.process.kill()
    assert codes(others, 120) == [1, 1]
    for i, other in enumerate(others):
        assert (
            f"host 1 of 3 (127.0.0.1) has disconnected; host {i + 2} of 3 exits too" in other.output
        )


@pytest.mark.slow
def test_one_of_two_fails_without_dying(start, tmp_path):
    """Keep its own exit code; the other process names it and its error."""
    port, both = free_port(), []
    try:
        for i, simulated in enumerate((4, 5)):
            both.append(Process(tmp_path, 2, i, port, ENDLESS, f"mesh.simulate={simulated}"))
        assert codes(both, 120) == [1, 2], both[0].output + both[1].output
    finally:
        for each in both:
            each.process.kill()
    assert "host 2 of 2 failed: ConfigError: override" in both[0].output
    assert "do not split over 2 processes" in both[0].output


@pytest.mark.slow
def test_hosts_that_read_other_inputs(start, tmp_path):
    """End all of them at the start, before they train on as one."""
    (tmp_path / "sitecustomize.py").write_text("""
import dataclasses
import sys
from gpipe_jax import data
from gpipe_jax.data import DATASETS
whole = DATASETS["digits"]
def shifted(*args, **kwargs):
    dataset = whole(*args, **kwargs)
    def train(*args):
        for batch in dataset.train(*args):
            yield {**batch, "inputs": batch["inputs"][:, ::-1]}
    return dataclasses.replace(dataset, train=train)
if "--process=1" in sys.argv:
    DATASETS["digits"] = shifted
""")
    both = start(2)
    assert codes(both) == [2, 2], both[0].output + both[1].output
    for each in both:
        assert "the first training batch of digits is not the same on all hosts" in each.output


@pytest.mark.slow
def test_a_host_that_cannot_read_the_newest_checkpoint(start, tmp_path):
    """Resume all from an older one, which all can read; leave the newest one until it is saved."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
from etils import epath
kind = type(epath.Path("/"))
read = kind.read_bytes
def fails(path):
    if path.match("20/state/*"):
        raise OSError(5, "Input/output error")
    return read(path)
if "--process=1" in sys.argv:
    kind.read_bytes = fails
""")
    checkpoints = tmp_path / "2 processes" / "checkpoints"
    assert codes(start(2)) == [0, 0]
    again = start(2)
    assert codes(again) == [0, 0], again[0].output + again[1].output
    reason = "cannot be used now (another host cannot use it); using that of step 10"
    assert reason in again[0].output
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "20", "20.unreadable"]


@pytest.fixture
def nothing_set(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    return monkeypatch


def test_a_single_process_by_default(nothing_set):
    assert cluster.find(None, None, None) is None and not cluster.is_requested(None, None, None)


def test_requests_by_options_or_environment(nothing_set):
    expected = Cluster("somewhere:1234", 4, 2)
    assert cluster.find("somewhere:1234", 4, 2) == expected
    nothing_set.setenv("JAX_COORDINATOR_ADDRESS", "somewhere:1234")
    nothing_set.setenv("JAX_NUM_PROCESSES", "4")
    assert cluster.find(None, None, 2) == expected and cluster.is_requested(None, None, None)


def test_a_slurm_job_is_found(nothing_set):
    job = {"JOB_ID": "7", "STEP_NODELIST": "node[01-04]", "NTASKS": "4", "PROCID": "3"}
    for name, value in {**job, "LOCALID": "0"}.items():
        nothing_set.setenv(f"SLURM_{name}", value)
    detected = cluster.find(None, None, None)
    assert detected and detected.coordinator.startswith("node01:") and detected[1:] == (4, 3)
    nothing_set.setenv("SLURM_NTASKS", "1")
    assert cluster.find(None, None, None) is None


@pytest.mark.parametrize(
    ("options", "argument", "message"),
    [
        (("a:1", None, 0), "num_processes", "JAX_COORDINATOR_ADDRESS, .* give all three"),
        ((None, 2, 0), "coordinator", "JAX_COORDINATOR_ADDRESS, .* give all three"),
        (("a:1", 2, 2), "process_index", "2 of 2 processes: they count from 0 to 1"),
        (("a:1", 0, 0), "num_processes", "there must be at least 1 process, got 0"),
        (("a", 2, 1), "coordinator", "a has no port; write it as HOST:PORT"),
        (("a:1", "two", 1), "num_processes", "JAX_NUM_PROCESSES must be a whole number, got two"),
        (("a:1", 2, "b"), "process_index", "JAX_PROCESS_ID must be a whole number, got b"),
    ],
)
def test_bad_requests(nothing_set, options, argument, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        cluster.find(*options)
    assert caught.value.argument == argument
