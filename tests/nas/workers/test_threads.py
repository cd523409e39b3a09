"""End a process while candidates train, with the exit code that it should have."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import HELPERS

import nas
from nas import cli
from nas.workers import threads

MINE = """\
import itertools
import threading
import jax

numbers = itertools.count()
step = jax.jit(lambda x: x * 1.0001 + 1)

def without_end():
    print("begun", flush=True)
    x = jax.numpy.ones((128, 128))
    while True:  # in and out of XLA
        float(step(x).sum())

def first_hangs(genotype):
    if next(numbers) == 0:
        without_end()
    return 1.0

def fails(genotype):
    if next(numbers) == 0:
        without_end()
    raise RuntimeError("no accelerator")

def none(genotype):
    without_end()
"""
CONFIG = """\
space: {kind: nasnet}
evaluate: {kind: function, function: mine:first_hangs}
evolution: {population: 4, sample: 2}
run: {cycles: 30, workers: 2}
"""


def begin(folder: Path, *overrides: str) -> subprocess.Popen:
    (folder / "mine.py").write_text(MINE)
    (folder / "mine.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "nas.cli", "search", "mine.yaml", *overrides]
    # In a job of the background Ctrl-C is ignored, which the new process would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["run.target=1"], 0, "best_fitness"),
        (["evaluate.function=mine:fails"], 1, "10 evaluations have failed in a row"),
        (["evaluate.function=mine:none", "run.time_limit_s=2"], 1, "has no result yet"),
    ],
)
def test_the_exit_code_while_candidates_train(tmp_path, overrides, code, said) -> None:
    done = begin(tmp_path, *overrides)
    out, err = done.communicate(timeout=120)
    assert (done.returncode, said in out + err) == (code, True), err
    assert "begun" in out


def test_the_exit_code_after_an_interrupt(tmp_path) -> None:
    done = begin(tmp_path, "evaluate.function=mine:none")
    assert done.stdout is not None and done.stdout.readline().startswith("begun")
    time.sleep(0.3)
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 130 and "interrupted; run the same command again to resume" in err


SCRIPT = """\
import sys
import threading
sys.path[:0] = {paths!r}
import toy
from nas.training import compilation_cache
from nas.training.loop import Training

def spy(self, number):
    begun.set()
    return epoch(self, number)

begun, epoch, Training._epoch = threading.Event(), Training._epoch, spy
compilation_cache.use({cache!r})
result = toy.search({folder!r}, toy.toy(epochs=10**9, warmup_epochs=0), workers=2, wait=False)
begun.wait()
if {stops}:
    result.stop()
sys.exit(7)
"""


@pytest.mark.parametrize("stops", [True, False])
def test_a_script_ends_its_trainings_first(tmp_path, stops) -> None:
    """End them without failures, also if a driver runs in the background."""
    paths = [str(path) for path in HELPERS]
    named = {
        "folder": str(tmp_path),
        "cache": str(tmp_path.parent / "threads cache"),
        "stops": stops,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(paths=paths, **named)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    counts = nas.load("search", tmp_path).counts
    assert (counts.running, counts.failures, counts.evaluations) == (2, 0, 0)


HANGS = """\
import sys
import threading
import time
import jax
import jax.numpy as jnp
from nas.workers import threads

def compiles():  # for some seconds
    def network(x):
        for i in range(150):
            x = jnp.sin(x @ x[:, ::-1]) + jnp.cumsum(x, i % 2)
        return x
    jax.jit(network)(x)

def computes():  # in and out of XLA, without end
    while True:
        float(step(x).sum())

def sleeps():
    time.sleep(1000)

def run():
    begun.set()
    {job}()

threads.END_S = 0.2
begun, x, step = threading.Event(), jnp.ones((64, 64)), jax.jit(lambda x: x * 1.0001 + 1)
threads.DaemonThreads().submit(run)
begun.wait()
time.sleep(0.5)
sys.exit(7)
"""


@pytest.mark.parametrize("job", ["compiles", "computes", "sleeps"])
def test_a_script_ends_with_its_exit_code_while_xla_works(job) -> None:
    """Wait for XLA, which aborts a process that stops its threads; for nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(job=job)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr


def test_jobs_that_check_end_when_their_threads_are_closed() -> None:
    """Leave no training behind when a search is stopped and resumed on the same devices."""

    def until_asked() -> None:
        begun.set()
        try:
            while True:
                threads.check_ending()
                time.sleep(0.01)
        finally:
            ended.set()

    begun, ended, other = (threading.Event() for _ in range(3))
    pool, another = threads.DaemonThreads(), threads.DaemonThreads()
    pool.submit(until_asked)
    waits = another.submit(lambda: other.wait(30) and threads.check_ending())
    assert begun.wait(10) and not ended.wait(0.1)
    pool.close()
    assert ended.wait(10)
    other.set()
    assert waits.result(10) is None  # of others nothing is asked
    another.close()


def test_a_bug_has_an_exit_code(monkeypatch, capsys) -> None:
    def fault() -> int:
        raise KeyError("mutate")

    monkeypatch.setattr(cli, "main", fault)
    with pytest.raises(SystemExit) as raised:
        cli.program()
    assert raised.value.code == 1 and "KeyError: 'mutate'" in capsys.readouterr().err
