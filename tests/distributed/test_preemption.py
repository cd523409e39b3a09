"""Send signals, as a terminal or a supervisor does, while the main thread is busy."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import REPOSITORY

CONFIG = """\
model: {kind: mlp, features: [64, 12, 10]}
data: {kind: digits, batch_size: 24}
train: {steps: 1000000, save_every: 5}
"""
# The start, the compilation of the step, or a checkpoint takes long.
SLOW = {
    "start": """
import time
from gpipe_jax.training import from_config
def slow(*args):
    print("starting", flush=True)
    time.sleep(60)
from_config.assemble = slow
""",
    "compile": """
import time
from gpipe_jax.training import trainer
def slow(*args):
    print("compiling", flush=True)
    time.sleep(60)
trainer.Trainer._update = slow
""",
    "save": """
import time
from gpipe_jax.checkpoint import format as checkpoint_format
def slow(*args):
    print("saving", flush=True)
    time.sleep(60)
checkpoint_format.write_file = slow
""",
}


@pytest.fixture
def start(tmp_path):
    """Provide `start(slow)`: a run in a child process."""
    started = []

    def run(slow: str) -> subprocess.Popen:
        (tmp_path / "c.yaml").write_text(CONFIG)
        arguments = ["train", str(tmp_path / "c.yaml"), f"train.workdir={tmp_path / 'run'}"]
        command = f"from gpipe_jax.cli.main import main\nraise SystemExit(main({arguments}))"
        code = SLOW[slow] + command
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"never printed {text!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_compiling_there_is_nothing_to_save(start, tmp_path, number):
    process = start("compile")
    wait_for(process, "compiling")
    process.send_signal(number)
    assert process.wait(timeout=20) == 75
    assert f"{number.name}: stopping at once, as there is nothing to save" in process.stdout.read()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.yaml", "lock", "metrics.jsonl",
    ]  # fmt: skip


def test_while_starting_there_is_nothing_to_save(start, tmp_path):
    process = start("start")
    wait_for(process, "starting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert "SIGTERM: stopping at once, as there is nothing to save" in process.stdout.read()
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_stops_at_once(start):
    process = start("save")
    wait_for(process, "saving")
    process.send_signal(signal.SIGINT)
    wait_for(process, "SIGINT: saving after this step (Ctrl-C: stop at once)")
    process.send_signal(signal.SIGTERM)  # as supervisors do repeatedly
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert "stopped at once; the newest checkpoint is unchanged" in process.stdout.read()
