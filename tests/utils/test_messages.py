"""Check that what is printed cannot control a terminal."""

import argparse
import io
import os
import sys
from typing import Any

import pytest
from rich.console import Console

from gpipe_jax import progress
from gpipe_jax.utils import console, messages

EVIL = "a\x1b[2J\x9b31m\rb\u202ec\udcff"
SAFE = r"a\x1b[2J\x9b31m\rb\u202ec\udcff"


def test_printable_keeps_what_is_text() -> None:
    text = "é 日本\t[red]\n\\x1b ✓"
    assert messages.printable(text) == text
    assert messages.printable(EVIL) == SAFE


@pytest.mark.parametrize("write", [messages.write, messages.say])
def test_everything_is_printed_through_the_same_escape(write: Any, capsys: Any) -> None:
    write(EVIL)
    out, err = capsys.readouterr()
    assert (out or err.removeprefix("gpipe: ")) == f"{SAFE}\n"


@pytest.mark.parametrize(("write", "stream"), [("write", "stdout"), ("say", "stderr")])
def test_a_program_goes_on_when_its_reader_has_ended(write: str, stream: str, monkeypatch: Any):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        monkeypatch.setattr(sys, stream, pipe)
        for _ in range(2):
            getattr(messages, write)("a line")


@pytest.mark.parametrize(("write", "stream"), [("write", "stdout"), ("say", "stderr")])
def test_a_stream_that_cannot_encode_a_text(write: str, stream: str, monkeypatch: Any):
    file = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, stream, file)
    getattr(messages, write)("é 日")
    assert file.buffer.getvalue().endswith(b"\xe9 \\u65e5\n")


def test_usage_errors_are_escaped(capsys: Any) -> None:
    parser = console.new_parser("gpipe", "Test.")
    with pytest.raises(SystemExit):
        console.parse(parser, [EVIL])
    assert SAFE in capsys.readouterr().err


def test_progress_is_escaped_and_has_no_markup() -> None:
    for is_terminal in (True, False):
        file = io.StringIO()
        terminal = Console(file=file, force_terminal=is_terminal, width=200, color_system=None)
        progress.passing(terminal)(f"[bold]{EVIL}")
        assert f"[bold]{SAFE}" in file.getvalue()
    file = io.StringIO()
    with progress.show(2, 1, Console(file=file, force_terminal=True, width=200)) as show:
        show({"step": 1, f"[red]{EVIL}": 1.0})
    assert f"[red]{SAFE} 1" in file.getvalue()


def test_lines_of_progress_are_escaped(capsys: Any) -> None:
    with progress.show(2, 1, Console(force_terminal=False)) as show:
        show({"step": 1, "loss": 1.0, EVIL: 2.0})
    with progress.counting(1, EVIL) as count:
        count(1, EVIL)
    out = capsys.readouterr().out
    assert out.count(SAFE) == 3 and "\x1b" not in out


def test_paths_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert str(console.path("~/x.json")) == "/home/me/x.json"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^s3://b/x: s3:// addresses"):
        console.path("s3://b/x")
