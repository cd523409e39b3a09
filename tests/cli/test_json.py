"""Check that a command with `--json` ends with one JSON object, also if it fails."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import nas.cli
from gpipe_jax.cli import main as cli
from gpipe_jax.utils import messages

CONFIG = "model: {kind: mlp}\ndata: {kind: digits}\n"
MAIN: dict[str, Callable] = {"gpipe": cli.main, "nas": nas.cli.main}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(CONFIG)
    (tmp_path / "bad.yaml").write_text(CONFIG + "mesh: {stage: 2}\n")
    (tmp_path / "config.yaml").touch()
    return tmp_path


def run(program: str, *arguments: str) -> int:
    try:
        return MAIN[program](arguments)
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("gpipe train bad.yaml", 2, "bad.yaml:3: unknown key 'mesh.stage'"),
        ("gpipe train good.yaml --process 1", 2, "--coordinator"),
        ("gpipe eval nothing", 2, "no such file or folder"),
        ("gpipe export nothing --out a.npz", 2, "nothing"),
        ("gpipe plan bad.yaml", 2, "unknown key"),
        ("gpipe plan good.yaml --search", 2, "needs a --topology"),
        ("gpipe config", 2, "give a CONFIG file"),
        ("gpipe schedule --stages 0 --micro-batches 2", 2, "--stages"),
        ("gpipe schedule --stages 1", 2, "required: --micro-batches"),
        ("gpipe init .", 2, "config.yaml exists already"),
        ("gpipe trian", 2, "did you mean 'train'?"),
        ("nas search bad.yaml", 2, "config of `gpipe train`"),
        ("nas report nothing", 2, "no run 'nothing'"),
        ("nas export nothing --out a.json", 2, "no run 'nothing'"),
        ("nas export nothing", 2, "required: --out"),
    ],
)
def test_a_failure(
    command: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = command.split()
    assert run(program, *arguments, "--json") == code
    out, err = capsys.readouterr()
    error = json.loads(out.splitlines()[-1])["error"]
    assert message in error["message"] and error["exit_code"] == code
    assert message in err
    assert run(program, *arguments) == code
    assert "exit_code" not in capsys.readouterr().out


def test_problems_of_a_config_are_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    run("gpipe", "train", "bad.yaml", "--json", "mesh.data=0")
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert len(problems) == 2 and problems[0].startswith("bad.yaml:3: ")


def test_results_and_a_failure_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a picture which cannot be written does not lose the plan."""
    assert run("gpipe", "plan", "good.yaml", "--png", "a.unknown", "--json") == 2
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parameters"] > 0 and "no picture a.unknown" in result["error"]["message"]


def test_a_bug_is_an_error_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of a bug")

    monkeypatch.setattr(cli.show.loader, "load", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["config", "good.yaml", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"message": "ZeroDivisionError: of a bug", "exit_code": 1}


def test_outside_of_a_command_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    messages.answer({"a": 1})
    messages.fail("it failed", 2)
    messages.finish_answer()
    assert capsys.readouterr().out == ""


def test_before_a_hard_exit_the_object_is_written_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with messages.answering(as_json=True):
        messages.fail("it failed", 75)
        messages.finish_answer()
        assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 75
    assert capsys.readouterr().out == ""
