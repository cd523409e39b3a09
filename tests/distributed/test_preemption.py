"""Send signals, as a terminal or a supervisor does, while the main thread is busy."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from paths import REPOSITORY

CONFIG = """\
model: {kind: mlp, features: [64, 12, 10]}
data: {kind: digits, batch_size: 24}
train: {steps: 1000000, save_every: 5}
"""
# The imports, the start, the compilation of the step, or a checkpoint takes long.
SLOW = {
    "": "",
    "import": """
import sys
import time
class Slow:
    def find_spec(name, path, target=None):
        if name == "jax":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow)
""",
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
from gpipe_jax.training.fitting.train_step import TrainStep
def slow(*args):
    print("compiling", flush=True)
    time.sleep(60)
TrainStep._update = slow
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
        command = "from gpipe_jax.__main__ import main\nsys.exit(main())"
        code = f"import sys\nsys.argv[1:] = {arguments}\n{SLOW[slow]}{command}"
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
        "checkpoints", "config.yaml", "lock", "metrics.jsonl", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_while_importing_there_is_nothing_to_save(start, tmp_path, number):
    process = start("import")
    wait_for(process, "importing")
    process.send_signal(number)
    assert process.wait(timeout=20) == 75
    assert f"{number.name}: stopping at once, as there is nothing to save" in process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_signals_that_are_repeated_to_the_end_change_nothing(start, tmp_path, number):
    """Save once, and exit with code 75, also if a signal comes when the interpreter ends."""
    process = start("")
    wait_for(process, "step 10/")
    while process.poll() is None:
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    said = process.stdout.read()
    assert process.returncode == 75, said
    assert said.count("saving after this step") == 1 and "which is saved" in said


def test_a_hangup_is_ignored_under_nohup(start, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does for its child
    try:
        process = start("start")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(process, "starting")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "gpipe_jax", *sys.argv[1:]])
"""


def test_a_terminal_that_is_gone_ends_no_run(tmp_path):
    """Save and exit with code 75, although nothing can be printed any more."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    arguments = ["train", str(tmp_path / "c.yaml"), f"train.workdir={tmp_path / 'run'}"]
    terminal, end = pty.openpty()
    # Not `pty.fork`: a fork of a process that has used JAX may hang.
    command = [sys.executable, "-c", ON_A_TERMINAL, *arguments]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end)
    os.close(end)
    reader = threading.Thread(target=read_all, args=(terminal,), daemon=True)
    reader.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "10").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    assert process.wait(timeout=120) == 75


def read_all(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 4096):
            pass


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


FORK = """
import os, signal, time
from gpipe_jax.distributed.preemption import handle_signals

def forked():
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    time.sleep(0.2)
    return child

with handle_signals() as stop:
    children = forked(), forked()
    os.kill(children[0], signal.SIGTERM)
    status = os.waitpid(children[0], 0)[1]
    time.sleep(0.2)
    print(os.waitstatus_to_exitcode(status), stop.is_requested, flush=True)
os.kill(children[1], signal.SIGKILL)
"""


def test_a_forked_process_can_be_ended_and_stops_no_run():
    """Let a run with forked workers, as loaders of data start them, go on and end."""
    command = [sys.executable, "-c", FORK]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=40)
    assert ended.stdout == f"{-signal.SIGTERM} False\n" and ended.returncode == 0
