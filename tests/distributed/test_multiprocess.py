"""Several processes as one run: the same numbers and checkpoints, and what if one dies."""

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
from gpipe_jax.distributed.processes import roll_call
from gpipe_jax.errors import MissingProcessError

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
    """`gpipe train` in a process of its own, as one of `count`."""

    def __init__(self, folder: Path, count: int, index: int, port: int, *overrides: str) -> None:
        command = [
            sys.executable, "-m", "gpipe_jax", "train", str(folder / "c.yaml"),
            f"train.workdir={folder / f'{count} processes'}", *overrides,
        ]  # fmt: skip
        command += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        paths = f"{REPOSITORY}{os.pathsep}{folder}"  # of a sitecustomize.py, if the test makes one
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
        raise AssertionError(f"never said {text!r}: {self.output}")

    @property
    def output(self) -> str:
        return "".join(self.lines)


@pytest.fixture
def start(tmp_path):
    """`start(count, *overrides)`: so many processes of one run; killed at the end of the test."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    started: list[Process] = []

    def run(count: int, *overrides: str) -> list[Process]:
        port = free_port()
        some = [Process(tmp_path, count, i, port, *overrides) for i in range(count)]
        started.extend(some)
        return some

    yield run
    for one in started:
        one.process.kill()  # one that jax.distributed connected outlives SIGTERM
        one.process.wait()


def codes(processes: list[Process], timeout_s: float = 240) -> list[int]:
    deadline = time.monotonic() + timeout_s
    return [p.process.wait(timeout=max(deadline - time.monotonic(), 1)) for p in processes]


def files(workdir: Path, step: int) -> dict[str, bytes]:
    folder = workdir / "checkpoints" / str(step) / "state"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(workdir: Path) -> list[float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r.get("loss", r.get("test_loss")) for r in records]


def check_as_one(start, folder: Path, count: int, *overrides: str) -> list[Process]:
    several, alone = start(count, *overrides), start(1, *overrides)
    assert codes(several + alone) == [0] * (count + 1), several[0].output + several[1].output
    one, more = folder / "1 processes", folder / f"{count} processes"
    assert len(losses(one)) == 22 and losses(more) == pytest.approx(losses(one), abs=1e-6)
    assert len(files(one, 20)) >= 4 and files(more, 20) == files(one, 20)
    names = {path.name for path in more.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "lock"}
    return several


def test_two_processes_are_as_one(start, tmp_path):
    """Each has one stage; then each has a replica, and reads its half of every batch."""
    first, second = check_as_one(start, tmp_path, 2)
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
def test_several_processes_are_as_one(start, tmp_path, count, overrides):
    check_as_one(start, tmp_path, count, *overrides)


@pytest.mark.slow
@pytest.mark.slow
def test_all_cut_by_the_times_of_the_first(start, tmp_path):
    """By their own the first would put two layers into the first stage, the second one."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
from gpipe_jax.partition import costs
times = iter([9.0, 1.0, 1.0] if "--process=1" in sys.argv else [1.0, 1.0, 9.0])
costs._measured_time = lambda program, specs: next(times)
""")
    check_as_one(start, tmp_path, 2, "pipeline.cost=time")


@pytest.mark.slow
def test_preempted_in_an_evaluation(start, tmp_path):
    """SIGTERM to one: both leave the evaluation, and save the step before it."""
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
    assert all("stopped after step 10, which is saved" in one.output for one in both)
    assert (
        len(files(tmp_path / "2 processes", 10)) == 4
        and len(losses(tmp_path / "2 processes")) == 10
    )


def test_preempted_then_one_is_killed(start, tmp_path):
    """SIGTERM to one: both save the same step. SIGKILL to one: the other says which, and ends."""
    first, second = both = start(2, ENDLESS)
    first.wait_for("step 10/")
    second.process.send_signal(signal.SIGTERM)
    assert codes(both, 60) == [75, 75], first.output + second.output
    steps = [p.output.split("stopped after step ")[1].split(",")[0] for p in both]
    assert steps[0] == steps[1] and len(files(tmp_path / "2 processes", int(steps[0]))) == 4
    first, second = both = start(2, ENDLESS)
    first.wait_for(f"step {int(steps[0]) + 10 - int(steps[0]) % 10}/")  # it goes on
    second.process.kill()
    began = time.monotonic()
    assert codes([first], 60) == [1] and time.monotonic() - began < 60
    assert f"host 2 of 2 ({socket.gethostname()}) is gone; host 1 of 2 ends too" in first.output
    assert "Traceback" not in first.output


@pytest.mark.slow
def test_the_first_of_three_is_killed(start):
    first, *others = start(3, ENDLESS, "mesh.stages=3", "mesh.data=1", "mesh.simulate=3")
    first.wait_for("step 10/")
    first.process.kill()
    assert codes(others, 60) == [1, 1]
    for i, one in enumerate(others):
        assert f"host 1 of 3 (127.0.0.1) is gone; host {i + 2} of 3 ends too" in one.output


@pytest.mark.slow
def test_one_of_two_fails_without_dying(start, tmp_path):
    """It has an exit code of its own, and the other says which failed, and why."""
    port, both = free_port(), []
    try:
        for i, simulated in enumerate((4, 5)):
            both.append(Process(tmp_path, 2, i, port, ENDLESS, f"mesh.simulate={simulated}"))
        assert codes(both, 120) == [1, 2], both[0].output + both[1].output
    finally:
        for one in both:
            one.process.kill()
    assert "host 2 of 2 failed: ConfigError: override" in both[0].output
    assert "do not split over 2 processes" in both[0].output


# --- who is there --------------------------------------------------------------------------------


def call(*clusters: Cluster, timeout_s: float) -> list:
    """What the roll call comes to in each process, here threads: peers, or the error."""
    found: list = [None] * len(clusters)

    def one(i: int) -> None:
        try:
            found[i] = roll_call(clusters[i], timeout_s)
        except MissingProcessError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_are_there():
    address = f"127.0.0.1:{free_port()}"
    first, *others = call(*(Cluster(address, 4, i) for i in range(4)), timeout_s=20)
    assert sorted(peer.index for peer in first) == [1, 2, 3]
    assert {peer.name for peer in first} == {socket.gethostname()}
    assert [[peer.index for peer in peers] for peers in others] == [[0]] * 3


def test_those_who_are_missing_are_named_everywhere(capsys):
    address = f"127.0.0.1:{free_port()}"
    found = call(*(Cluster(address, 4, i) for i in (0, 2)), timeout_s=2)
    problem = (
        "hosts 2, 4 of 4 did not come within 2 s; did you start the same command on every host "
        "(--worker=all)?"
    )
    assert found == [problem, problem]
    said = capsys.readouterr().err
    assert "host 1 of 4, waiting for hosts 2, 3, 4 (time-out 2 s); did you start" in said


def test_strangers_are_not_counted():
    """Such as a port scanner, or another run's process."""
    port = free_port()
    address = f"127.0.0.1:{port}"

    def disturb() -> None:
        for text in (b"GET / HTTP/1.1\r\n", b"9 somewhere\n", b""):
            time.sleep(0.2)
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(text)

    thread = threading.Thread(target=disturb)
    thread.start()
    (found,) = call(Cluster(address, 2, 0), timeout_s=2)
    thread.join()
    assert found.startswith("host 2 of 2 did not come within 2 s")


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (found,) = call(Cluster(f"127.0.0.1:{port}", 2, 0), timeout_s=1)
    assert f"port {port} of --coordinator 127.0.0.1:{port} cannot be opened here" in found


def test_the_first_is_missing():
    address = f"127.0.0.1:{free_port()}"
    (found,) = call(Cluster(address, 2, 1), timeout_s=1)
    assert found.startswith(f"host 1 of 2 ({address}) did not come; did you")


@pytest.fixture
def nothing_set(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    return monkeypatch


def test_alone_if_nothing_says_otherwise(nothing_set):
    assert cluster.find(None, None, None) is None and not cluster.is_asked(None, None, None)


def test_asked_by_options_or_environment(nothing_set):
    wanted = Cluster("somewhere:1234", 4, 2)
    assert cluster.find("somewhere:1234", 4, 2) == wanted
    nothing_set.setenv("JAX_COORDINATOR_ADDRESS", "somewhere:1234")
    nothing_set.setenv("JAX_NUM_PROCESSES", "4")
    assert cluster.find(None, None, 2) == wanted and cluster.is_asked(None, None, None)


def test_a_slurm_job_is_found(nothing_set):
    job = {"JOB_ID": "7", "STEP_NODELIST": "node[01-04]", "NTASKS": "4", "PROCID": "3"}
    for name, value in {**job, "LOCALID": "0"}.items():
        nothing_set.setenv(f"SLURM_{name}", value)
    found = cluster.find(None, None, None)
    assert found and found.coordinator.startswith("node01:") and found[1:] == (4, 3)
    nothing_set.setenv("SLURM_NTASKS", "1")
    assert cluster.find(None, None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("a:1", None, 0), "several processes need --coordinator HOST:PORT .* give all three"),
        (("a:1", 2, 2), "--process 2 of --processes 2: processes count from 0 to 1"),
        (("a", 2, 1), "--coordinator a has no port; write it as HOST:PORT"),
        (("a:1", "two", 1), "JAX_NUM_PROCESSES two and JAX_PROCESS_ID 1 must be numbers"),
    ],
)
def test_clusters_that_cannot_be(nothing_set, options, message):
    with pytest.raises(ValueError, match=message):
        cluster.find(*options)
