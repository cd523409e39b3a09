"""Run the commands as a user does: check what they print, write and return."""

import io
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from paths import REPOSITORY
from rich.console import Console

from gpipe_jax import progress
from gpipe_jax.cli import init
from gpipe_jax.cli import main as cli
from gpipe_jax.utils.text import install_advice

CONFIG = """\
model:
  kind: mlp
  features: [64, 12, 10]
data: {kind: digits, batch_size: 24}
mesh:
  stages: 2
pipeline: {micro_batches: 2}
optimizer: {kind: sgd, learning_rate: 0.05, schedule: constant}
train: {steps: 5, eval_every: 4, log_every: 2}
"""
JSON_KEYS = {
    "test_loss", "test_accuracy", "steps", "step_time_s", "wall_s", "workdir", "stages",
    "bubble_fraction",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a folder with a space in its name: a config, and a finished run of it in `run 1`."""
    folder = tmp_path_factory.mktemp("some where")
    (folder / "digits.yaml").write_text(CONFIG)
    command = ["train", str(folder / "digits.yaml"), "--json", f"train.workdir={folder / 'run 1'}"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *a, **k: lines.extend(str(a[0]).splitlines()))
        assert cli.main(command) == 0
    return folder, lines


@pytest.fixture
def gpipe(trained, capsys, monkeypatch, tmp_path):
    """`gpipe(command, *arguments)` on the config: (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: str, config=trained[0] / "digits.yaml"):
        try:
            code = cli.main([command, *([str(config)] if config else []), *map(str, arguments)])
        except SystemExit as error:  # argparse
            code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return run


def refuses(result, *texts: str) -> None:
    """Exit code 2, each text on stderr, no result on stdout."""
    code, out, err = result
    assert (code, out) == (2, []), err
    for text in texts:
        assert text in err


# --- train and eval ------------------------------------------------------------------------------


def test_train_prints_table_progress_and_summary(trained):
    _, lines = trained
    assert lines[0].startswith("stage  layers  first layer")
    progress = [line for line in lines if line.startswith("step ")]
    steps = [line.split(":")[0] for line in progress]
    assert steps == [f"step {s}/5" for s in (1, 2, 4, 4, 5, 5)]
    assert "loss" in progress[0] and "step_time_s" in progress[0]
    assert "test_accuracy" in progress[-1]
    assert not any("None" in line for line in lines[:-1])
    assert lines[-2].startswith("curves: ") and Path(lines[-2][8:]).is_file()


def test_train_ends_with_one_json_object(trained):
    folder, lines = trained
    figures = json.loads(lines[-1])
    assert figures.keys() >= JSON_KEYS
    assert (figures["steps"], figures["stages"]) == (5, 2)
    assert figures["workdir"] == str(folder / "run 1")
    names = {path.name for path in (folder / "run 1").iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "curves.png",
        "lock",
        "run.json",
    }


def test_eval_gives_the_last_evaluation(trained, gpipe):
    folder, lines = trained
    code, out, _ = gpipe("eval", f"train.workdir={folder / 'run 1'}", "--json")
    found, wanted = json.loads(out[-1]), json.loads(lines[-1])
    assert code == 0 and found.keys() >= JSON_KEYS
    assert {**wanted, **found, "wall_s": 0} == {**wanted, "wall_s": 0}


def test_eval_needs_no_package_of_a_writer(trained, gpipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    given = f"train.workdir={trained[0] / 'run 1'}", "train.writers=[wandb]"
    refuses(gpipe("train", *given), "pip install")
    assert gpipe("eval", *given)[0] == 0


@pytest.mark.parametrize("more", [[], ["--stages", "1"]])
def test_eval_takes_the_folder_of_a_run(trained, gpipe, tmp_path, more):
    """Move the folder, and evaluate on another number of stages."""
    folder, lines = trained
    shutil.copytree(folder / "run 1", tmp_path / "moved")
    code, out, _ = gpipe("eval", "--json", *more, config=tmp_path / "moved")
    found, wanted = json.loads(out[-1]), json.loads(lines[-1])
    assert code == 0 and found["workdir"] == str(tmp_path / "moved")
    assert found["stages"] == (1 if more else 2)
    assert found["test_loss"] == pytest.approx(wanted["test_loss"], rel=1e-5)


def test_eval_asks_before_it_runs_code_of_a_folder(gpipe, tmp_path, monkeypatch):
    """Evaluate a run of the same user at once; refuse that of another one without --trust."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert gpipe("init", config=None)[0] == 0
    assert gpipe("train", "train.steps=1", config="config.yaml")[0] == 0
    assert gpipe("eval", config="runs/first")[0] == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of another user"))
    refuses(
        gpipe("eval", config="runs/first"),
        "runs/first/config.yaml",
        "my_data.py, which you have not run with `gpipe train`",
        "add --trust if you trust it",
    )
    assert gpipe("eval", "--trust", config="runs/first")[0] == 0


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_the_help_says_that_the_code_of_a_config_runs(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "names Python code (data.source, model.function), it is run" in text


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("import sys; sys.exit(0)", 2, "raised SystemExit: 0"),
        ("def make(**_): raise SystemExit", 2, "raised SystemExit: "),
        (
            "import sys\nfrom gpipe_jax import data\n"
            "def make(batch_size, seed): return data.iterable('x', lambda step: sys.exit(0), list)",
            1,
            "a Python file of the run ended the program (sys.exit(0))",
        ),
    ],
)
def test_a_data_file_cannot_end_a_training_with_success(gpipe, tmp_path, code, exit_code, message):
    (tmp_path / "mine.py").write_text(code)
    found, _, err = gpipe("train", "data={kind: python, source: mine.py:make, batch_size: 24}")
    assert found == exit_code and message in err


def test_eval_names_its_own_option(trained, gpipe):
    result = gpipe("eval", "--stages", "0", config=trained[0] / "run 1")
    refuses(result, "gpipe eval: --stages: `stages` must be a whole number of at least 1, got 0")


def test_eval_of_a_folder_that_is_no_run(gpipe, tmp_path):
    refuses(
        gpipe("eval", config=tmp_path),
        f"{tmp_path}: the folder has no config.yaml; give the folder of a run",
    )


def test_export_writes_plain_files(trained, gpipe, tmp_path):
    run = trained[0] / "run 1"
    for suffix in ("safetensors", "npz"):
        code, out, _ = gpipe("export", "--out", f"a file.{suffix}", "--json", config=run)
        assert code == 0 and json.loads(out[-1])["out"] == f"a file.{suffix}"
    found = safetensors.numpy.load_file("a file.safetensors")
    other = dict(np.load("a file.npz"))
    assert (
        list(found)
        == list(other)
        == [f"layers.{i}.linear.{name}" for i in (0, 1) for name in ("bias", "kernel")]
    )
    layer = safetensors.numpy.load_file(run / "checkpoints" / "5" / "state" / "1.safetensors")
    for some in (found, other):
        kernel = some["layers.1.linear.kernel"]
        np.testing.assert_array_equal(kernel, layer["params.linear.kernel"])
        assert kernel.dtype == np.float32 and kernel.shape == (12, 10)
    assert json.loads(out[-1])["numbers"] == 64 * 12 + 12 + 12 * 10 + 10


@pytest.mark.parametrize(
    ("run", "out", "text"),
    [
        ("run 1", "a.pt", "--out: a.pt must end in .safetensors or .npz"),
        ("run 1", "missing/a.npz", "--out: missing/a.npz cannot be written: No such file"),
        ("run 1", "/etc/passwd/a.npz", "--out: /etc/passwd/a.npz cannot be written"),
        (".", "a.npz", "there is no checkpoint to export; give the folder of a run"),
    ],
)
def test_exports_that_cannot_be(trained, gpipe, tmp_path, run, out, text):
    refuses(gpipe("export", "--out", out, config=trained[0] / run), text)
    assert not list(tmp_path.iterdir())


def test_the_saved_config_names_its_run(trained, gpipe):
    folder = trained[0]
    code, out, _ = gpipe("train", "--json", config=folder / "run 1" / "config.yaml")
    assert code == 0 and not any(line.startswith("step ") for line in out)
    assert json.loads(out[-1])["workdir"] == str(folder / "run 1")


def test_eval_without_a_checkpoint(gpipe, tmp_path):
    code, _, err = gpipe("eval")
    assert code == 2 and "no checkpoint to evaluate" in err and "runs/digits" in err
    assert not (tmp_path / "runs").exists()


def test_another_config_in_the_folder(trained, gpipe):
    arguments = [f"train.workdir={trained[0] / 'run 1'}", "data.batch_size=12", "train.seed=1"]
    code, _, err = gpipe("train", *arguments)
    assert code == 2
    assert err.splitlines()[1:] == [
        "this folder holds a run of another config; use another (train.workdir=...)",
        "data.batch_size: 24 before, 12 now",
        "train.seed: 0 before, 1 now",
    ]


def test_a_workdir_that_is_a_file(trained, gpipe):
    code, _, err = gpipe("train", f"train.workdir={trained[0] / 'digits.yaml'}")
    assert code == 2 and "cannot write here" in err and "train.workdir=" in err
    assert (trained[0] / "digits.yaml").read_text() == CONFIG


def test_divergence(gpipe):
    code, out, err = gpipe("train", "optimizer.learning_rate=1e30", "train.steps=20")
    assert code == 1 and out[0].startswith("stage")
    assert "at step" in err and "try a lower optimizer.learning_rate" in err
    assert "last finite loss was" in err


def test_training_without_matplotlib(gpipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = gpipe("train", "train.steps=1", "--json", "mesh.stages=1")
    assert code == 0 and json.loads(out[-1])["steps"] == 1
    assert out[-2] == f"no curves: pictures need matplotlib: {install_advice('examples')}"


def test_digits_without_scikit_learn(gpipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refuses(gpipe("train"), "pip install 'gpipe-jax[examples]'")


def test_interrupted_by_the_user(gpipe, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpipe_jax.training.from_config.assemble", interrupt)
    code, _, err = gpipe("train")
    assert code == 130 and "interrupted" in err


def test_text_reports_bits_per_byte(gpipe, tmp_path):
    (tmp_path / "a text.txt").write_bytes(b"so it goes, " * 40)
    (tmp_path / "text.yaml").write_text(
        "model: {kind: transformer_lm, width: 8, heads: 2, feed_forward: 8, layers: 1, length: 8}\n"
        "data: {kind: text, source: a text.txt, batch_size: 4}\n"
        "train: {steps: 2}\n"
    )
    code, out, _ = gpipe("train", "--json", config="text.yaml")
    figures = json.loads(out[-1])
    assert code == 0 and figures["workdir"] == "runs/text"
    assert figures["bits_per_byte"] == pytest.approx(figures["test_loss"] / 0.6931471805599453)


def test_the_old_module_names_the_new_command(tmp_path):
    """End with the code that no supervisor retries."""
    command = [sys.executable, "-m", "gpipe_jax.train", "x.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpipe: use python -m gpipe_jax train x.yaml\n"


def test_module_is_the_same_command(trained, tmp_path):
    """`python -m gpipe_jax train`, with overrides on both sides of an option, on simulated CPUs."""
    command = [
        sys.executable, "-m", "gpipe_jax", "train", str(trained[0] / "digits.yaml"),
        f"train.workdir={tmp_path / 'run'}", "--json", "mesh.simulate=2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found, wanted = json.loads(done.stdout.splitlines()[-1]), json.loads(trained[1][-1])
    assert found["test_loss"] == pytest.approx(wanted["test_loss"], rel=1e-6)
    assert found["device"] == "cpu x 2"


def test_a_terminal_gets_a_bar_and_the_evaluations():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress.show(4, 1, console) as show:
        show({"step": 4, "loss": 0.25})
        show({"step": 4, "test_loss": 0.5})
    assert "4/4" in file.getvalue() and "loss 0.25" in file.getvalue()
    assert "step 4: test_loss 0.5" in file.getvalue()


# --- bad input -----------------------------------------------------------------------------------


def test_everything_wrong_in_a_file_at_once(gpipe, tmp_path):
    text = CONFIG.replace("stages: 2", "stagse: 2").replace("lr: ", "")
    text = text.replace("learning_rate: 0.05", "learning_rate: fast")
    (tmp_path / "bad.yaml").write_text(text)
    refuses(
        gpipe("train", "train.stepps=3", config="bad.yaml"),
        "3 problems in bad.yaml",
        "bad.yaml:6: unknown key 'mesh.stagse'; did you mean 'mesh.stages'?",
        "bad.yaml:8: optimizer.learning_rate: expected a number, got 'fast'",
        "override 'train.stepps=3': unknown key 'train.stepps'; did you mean 'train.steps'?",
    )


MANY = jax.device_count() + 1
BAD = {
    "stages=0": (["mesh.stages=0"], ["mesh.stages: expected at least 1, got 0"]),
    "more stages than layers": (["mesh.stages=3"], ["cannot cut 2 layers into 3 stages"]),
    "mesh larger than the devices": (
        [f"mesh.data={MANY}", f"data.batch_size={2 * MANY}"],
        [f"needs {2 * MANY} devices", f"mesh.simulate={2 * MANY}"],
    ),
    "simulate less than the mesh": (["mesh.simulate=1"], ["simulate 1 is less than", "raise it"]),
    "layer too large": (
        ["pipeline.memory_limit_gib=1e-6"],
        ["layer 0 (Dense(in_features=64", "above memory_limit"],
    ),
    "batch does not split": (["pipeline.micro_batches=7"], ["batch_size 24", "values: 21, 28"]),
    "costs of other layers": (["pipeline.cost=[1,2,3]"], ["2 layers"]),
    "warm-up as long as the run": (["optimizer.warmup_steps=5"], ["use at most 4"]),
    "batch above the data": (["data.batch_size=1500"], ["training examples of digits"]),
    "no value": (["mesh.stages"], ["expected section.field=value"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_input(gpipe, tmp_path, command, name):
    arguments, texts = BAD[name]
    refuses(gpipe(command, *arguments), *texts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ()),
        ("eval", ()),
        ("plan", ()),
        ("config", ()),
        ("export", ("--out", "x.npz")),
    ],
)
def test_addresses_are_no_paths(gpipe, command, arguments):
    refuses(gpipe(command, *arguments, config="s3://a/b.yaml"), "s3:// addresses are not supported")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("train", "train.workdir=http://a/b"), "override 'train.workdir=http://a/b': "),
        (("train", "--plan", "http://a/b"), "--plan: http://a/b: "),
        (("plan", "--out", "http://a/b"), "--out: http://a/b: "),
    ],
)
def test_addresses_of_options_are_refused(gpipe, arguments, place):
    problem = "http:// addresses are not supported"
    command, *rest = arguments
    code, out, err = gpipe(command, *rest)
    assert (code, out) == (2, []) and place in err and problem in err


def test_the_folder_of_a_run_may_be_in_the_home_folder(gpipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for workdir in ("~/a", "$HOME/a"):
        code, out, _ = gpipe("train", "train.steps=1", f"train.workdir={workdir}", "--json")
        assert code == 0 and json.loads(out[-1])["workdir"] == str(tmp_path / "home" / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    monkeypatch.delenv("NOT_SET", raising=False)
    refuses(gpipe("train", "train.workdir=$NOT_SET/a"), "variable NOT_SET is not set; set it")


@pytest.mark.parametrize("command", ["train", "eval", "config"])
def test_no_such_config(gpipe, command):
    refuses(gpipe(command, config="nothing.yaml"), "nothing.yaml: no such file")


def test_no_such_run(gpipe):
    problem = "nope: no such file or folder; give the folder of a run"
    refuses(gpipe("eval", config="nope"), problem)
    refuses(gpipe("export", "--out", "a.npz", config="nope"), problem)


def test_controls_of_a_terminal_are_escaped(gpipe, tmp_path):
    (tmp_path / "a\x1b[2J.yaml").write_text("a: !<\\u001b[31m> b\n", encoding="utf-8")
    code, out, err = gpipe("train", "mesh.\x1b[31m=3", config="a\x1b[2J.yaml")
    assert (code, out) == (2, []) and "\x1b" not in err
    assert "a\\x1b[2J.yaml" in err


def test_a_config_of_another_command(gpipe):
    search = REPOSITORY / "configs" / "search_digits.yaml"
    code, _, err = gpipe("train", config=search)
    assert code == 2 and err.count("\n") == 2
    assert f"{search}:1: this is a config of `nas search`; give it to that command" in err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("trian",), "'train'"),
        (("schedule", "--stages", 2, "--micro-batches", 4, "--kind", "1f1b_eager"), "'eager_1f1b'"),
    ],
)
def test_an_unknown_choice_gets_a_suggestion(gpipe, arguments, near):
    code, _, err = gpipe(*arguments, config=None)
    assert code == 2 and err.endswith(f"; did you mean {near}?\n")


@pytest.mark.parametrize("source", ["missing.txt", ".", "empty.txt"])
def test_an_unreadable_text(gpipe, tmp_path, source):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.yaml").write_text(
        f"model: {{kind: transformer_lm}}\ndata: {{kind: text, source: {source}}}\n"
    )
    refuses(gpipe("train", config="text.yaml"), f"text file {source}", "give")


@pytest.mark.parametrize(
    "arguments",
    [[], ["tarin"], ["train"], ["train", "x.yaml", "--jsno"], ["schedule", "--stages", "x"],
     ["schedule", "--stages", "2", "--micro-batches", "2", "a=b"]],
)  # fmt: skip
def test_bad_usage(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: gpipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in ["init", "train", "eval", "export", "plan", "config", "schedule"])],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as error:
        cli.main([*command, "--help"])
    assert error.value.code == 0
    assert "usage: gpipe" in capsys.readouterr().out


# --- schedule ------------------------------------------------------------------------------------


def test_schedule_draws(gpipe, tmp_path):
    arguments = ["--stages", 2, "--micro-batches", 3, "--kind", "gpipe", "--png", "a picture.png"]
    code, out, _ = gpipe("schedule", *arguments, "--json", config=None)
    assert code == 0
    assert [line.split() for line in out[1:3]] == [
        ["device", "0", "F0", "F1", "F2", ".", ".", "B0", "B1", "B2"],
        ["device", "1", ".", "F0", "F1", "F2", "B0", "B1", "B2", "."],
    ]
    figures = json.loads(out[-1])
    assert figures["bubble_fraction"] == 0.25 and figures["peak_stash"] == [3, 3]
    assert out[-2] == "picture: a picture.png"
    assert (tmp_path / "a picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--stages", 0, "--micro-batches", 2],
            "--stages: `num_devices` must be a whole number of at least 1, got 0",
        ),
        (["--stages", 2, "--micro-batches", -1], "--micro-batches: `micro_batches` must be a wh"),
        (["--stages", 2, "--micro-batches", 2, "--chunks", 2], "--chunks: the schedule '1f1b' has"),
    ],
)
def test_schedules_that_cannot_be(gpipe, arguments, text):
    refuses(gpipe("schedule", *arguments, config=None), text)


def test_a_schedule_of_many_devices_has_short_lines(gpipe):
    arguments = ["--stages", 40, "--micro-batches", 40]
    _, out, _ = gpipe("schedule", *arguments, config=None)
    assert max(map(len, out)) <= 100 and "[40, 39, " in "\n".join(out)


@pytest.mark.parametrize("path", ["missing/s.png", "s.exe", "."])
def test_pictures_that_cannot_be_written(gpipe, path):
    arguments = ["--stages", 2, "--micro-batches", 2, "--png", path]
    code, _, err = gpipe("schedule", *arguments, config=None)
    assert code == 2 and f"gpipe schedule: --png: {path}: " in err


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    command = f"{sys.executable} -m gpipe_jax schedule --stages 8 --micro-batches 8 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("tick ") and done.stdout.count("\n") == 1
    assert done.stderr == ""


# --- config --------------------------------------------------------------------------------------


def test_config_shows_every_setting(gpipe, tmp_path):
    code, out, _ = gpipe("config", "mesh.data=3")
    assert code == 0 and "  data: 3" in out and "  nesterov: false" in out
    (tmp_path / "again.yaml").write_text("\n".join(out))
    assert gpipe("config", config="again.yaml")[1] == out


def test_config_diff(gpipe):
    code, out, _ = gpipe("config", "--diff")
    assert code == 0 and "mesh.stages: 2 (default 1)" in out
    assert not any(line.startswith("train.seed") for line in out)
    _, (line,), _ = gpipe("config", "--diff", "--json")
    assert json.loads(line)["mesh.stages"] == {"default": 1, "value": 2}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--coordinator", "foo"], "--coordinator: foo has no port; write it as HOST:PORT"),
        (["--processes", 1], "--process: 1 of 1 processes: they count from 0 to 0"),
    ],
)
def test_the_option_of_a_process_that_is_wrong_is_named(gpipe, options, text):
    rest = ["--coordinator", "foo:1", "--processes", 2, "--process", 1]
    refuses(gpipe("train", *rest, *options), f"gpipe train: {text}")


def test_a_failed_detection_of_the_cluster_may_be_retried(gpipe, monkeypatch):
    def fail(_timeout_s):
        raise ConnectionError("the metadata server does not answer")

    monkeypatch.setattr("gpipe_jax.utils.xla_workarounds.detect_cluster", fail)
    code, out, err = gpipe("train")
    assert (code, out) == (1, [])
    assert err == "gpipe: the metadata server does not answer\n"


@pytest.mark.parametrize("command", ["config", "train"])
def test_a_setting_that_does_nothing_is_said(gpipe, trained, tmp_path, command):
    """And no more than that, also where a run goes on."""
    shutil.copytree(trained[0] / "run 1", tmp_path / "run")
    given = [f"train.workdir={tmp_path / 'run'}", "optimizer.decay_rate=0.5"]
    code, _, err = gpipe(command, *given)
    said = "gpipe: optimizer.decay_rate has no effect with optimizer.schedule constant\n"
    assert (code, err.count(said)) == (0, 1), err


def test_config_json_and_schema(gpipe):
    _, (line,), _ = gpipe("config", "--json")
    assert json.loads(line)["mesh"]["stages"] == 2
    code, out, _ = gpipe("config", "--schema", config=None)
    assert code == 0 and "model" in json.loads("\n".join(out))["required"]


def test_config_needs_a_file_or_the_schema(gpipe):
    refuses(gpipe("config", config=None), "give a CONFIG file, or --schema")


def test_overrides_are_not_required(gpipe):
    code, _, err = gpipe("train", config=None)
    assert code == 2 and err.endswith("the following arguments are required: CONFIG\n")


# --- init, version and completion -----------------------------------------------------------------


def test_init_writes_files_that_run(gpipe, tmp_path):
    code, out, _ = gpipe("init", "first run", "--json", config=None)
    folder = tmp_path / "first run"
    assert code == 0 and sorted(path.name for path in folder.iterdir()) == init.FILES
    assert json.loads(out[-1]) == {"files": [f"first run/{name}" for name in init.FILES]}
    assert out[-3] == "start with: cd 'first run'; gpipe train config.yaml"
    assert out[-2] == "a network of your own: cd 'first run'; python my_model.py"


def test_the_starter_runs_as_it_is(gpipe, tmp_path, monkeypatch):
    assert gpipe("init", config=None)[0] == 0
    code, out, err = gpipe("train", "train.steps=2", "--json", config="config.yaml")
    assert (code, err) == (0, "")
    figures = json.loads(out[-1])
    assert (figures["steps"], figures["stages"]) == (2, 2) and "test_accuracy" in figures
    assert (tmp_path / "runs" / "first" / "checkpoints" / "2").is_dir()


def test_the_network_of_the_starter_runs_as_it_is(gpipe, tmp_path):
    assert gpipe("init", config=None)[0] == 0
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "my_model.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.rsplit("loss ", 1)[1])
    assert abs(loss - np.log(10)) < 0.5


@pytest.mark.slow
def test_the_starter_learns_the_digits_in_a_minute(gpipe):
    assert gpipe("init", config=None)[0] == 0
    _, out, _ = gpipe("train", "--json", config="config.yaml")
    figures = json.loads(out[-1])
    assert figures["test_accuracy"] > 0.88 and figures["wall_s"] < 60


@pytest.mark.parametrize("name", init.FILES)
def test_init_overwrites_nothing(gpipe, tmp_path, name):
    (tmp_path / name).write_text("mine")
    refuses(gpipe("init", config=None), f"gpipe init: FOLDER: {name} exists already; choose")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_init_into_a_file(gpipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    refuses(
        gpipe("init", "file", config=None),
        "gpipe init: FOLDER: cannot write into file: File exists",
    )


def test_version(gpipe):
    code, out, _ = gpipe("--version", config=None)
    assert (code, out) == (0, [f"gpipe {metadata.version('gpipe-jax')}"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(gpipe, shell):
    code, out, _ = gpipe("--print-completion", shell, config=None)
    script = "\n".join(out)
    assert code == 0
    assert all(word in script for word in ("gpipe", "schedule", "micro-batches", "compile-best"))


def test_completion_in_bash(gpipe, tmp_path):
    """Bash completes commands and the names of files."""
    _, out, _ = gpipe("--print-completion", "bash", config=None)
    (tmp_path / "gpipe.sh").write_text("\n".join(out))
    (tmp_path / "my.yaml").write_text("")
    complete = (
        "source gpipe.sh; COMP_WORDS=(gpipe {words}); COMP_CWORD={index}; _shtab_gpipe; "
        'printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    for words, index, expected in (("sch", 1, "schedule"), ("train my", 2, "my.yaml")):
        code = complete.format(words=words, index=index)
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), done
