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

from gpipe_jax.distributed import cluster
from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.distributed.processes import wait_for_all
from gpipe_jax.errors import ArgumentError, MissingProcessError

CONFIG = """\
model: {kind: mlp, features: [64, 12, 12, 10]}
data: {kind: digits, batch_size: 24}
mesh: {stages: 2, data: 2, simulate: 4}
pipeline: {micro_batches: 2}
optimizer: {kind: adamw, learning_rate: 0.01, ema: 0.9}
train: {steps: 20, eval_every: 10, log_every: 1}
"""
ENDLESS = "train.steps=1000000"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


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
    deadline = time.monotonic() + timeout_s
    return [p.process.wait(timeout=max(deadline - time.monotonic(), 1)) for p in processes]


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
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "lock"}
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
    assert codes(both, 60) == [75, 75], first.output + second.output
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
    assert codes(both, 60) == [75, 75], first.output + second.output
    steps = [p.output.split("stopped after step ")[1].split(",")[0] for p in both]
    assert steps[0] == steps[1] and len(files(tmp_path / "2 processes", int(steps[0]))) == 4
    first, second = both = start(2, ENDLESS)
    first.wait_for(f"step {int(steps[0]) + 10 - int(steps[0]) % 10}/")  # it resumes
    second.process.kill()
    start_s = time.monotonic()
    assert codes([first], 60) == [1] and time.monotonic() - start_s < 60
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
    assert codes(others, 60) == [1, 1]
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


# --- connecting ----------------------------------------------------------------------------------


def connect_all(*clusters: Cluster, timeout_s: float) -> list:
    """Return the result of `wait_for_all` in each process, here a thread: peers, or the error."""
    results: list = [None] * len(clusters)

    def connect(i: int) -> None:
        try:
            results[i] = wait_for_all(clusters[i], timeout_s)
        except MissingProcessError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=connect, args=(i,)) for i in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_connect():
    address = f"127.0.0.1:{free_port()}"
    first, *others = connect_all(*(Cluster(address, 4, i) for i in range(4)), timeout_s=20)
    assert sorted(peer.index for peer in first) == [1, 2, 3]
    assert {peer.name for peer in first} == {socket.gethostname()}
    assert [[peer.index for peer in peers] for peers in others] == [[0]] * 3


def test_missing_processes_are_named(capsys):
    address = f"127.0.0.1:{free_port()}"
    results = connect_all(*(Cluster(address, 4, i) for i in (0, 2)), timeout_s=2)
    problem = (
        "hosts 2, 4 of 4 did not connect within 2 s; did you start the same command on every host "
        "(--worker=all)?"
    )
    assert results == [problem, problem]
    shown = capsys.readouterr().err
    assert "host 1 of 4, waiting for hosts 2, 3, 4 (time-out 2 s); did you start" in shown


def test_foreign_connections_are_ignored():
    """Ignore a port scanner, or another run's process."""
    port = free_port()
    address = f"127.0.0.1:{port}"

    def disturb() -> None:
        for text in (b"GET / HTTP/1.1\r\n", b"9 somewhere\n", b""):
            time.sleep(0.2)
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(text)

    thread = threading.Thread(target=disturb)
    thread.start()
    (problem,) = connect_all(Cluster(address, 2, 0), timeout_s=2)
    thread.join()
    assert problem.startswith("host 2 of 2 did not connect within 2 s")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (problem,) = connect_all(Cluster(f"127.0.0.1:{port}", 2, 0), timeout_s=1)
    assert (
        f"port {port} of the coordinator 127.0.0.1:{port} cannot be opened on this host" in problem
    )


def test_the_first_is_missing():
    address = f"127.0.0.1:{free_port()}"
    (problem,) = connect_all(Cluster(address, 2, 1), timeout_s=1)
    assert problem.startswith(f"host 1 of 2 ({address}) did not answer; did you")


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
