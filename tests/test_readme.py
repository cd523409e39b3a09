"""Check the README: its example runs and prints what it says, its commands and links are real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY as ROOT

from gpipe_jax.cli import main as cli
from gpipe_jax.config import loader
from nas import cli as nas_cli
from nas.config import SearchConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_example_runs_and_prints_what_is_shown() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    check = "assert float(loss) > 0 and len(pipe.to_layers(grads)) == len(layers)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "4 devices x 2 replicas" in done.stdout
    shown = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
    number = r"\d[\d,]*(?:\.\d+)?"
    assert re.sub(number, "#", done.stdout).split() == re.sub(number, "#", shown).split()
    # Costs are counted from XLA's programs, which differ a little between versions of JAX.
    printed, expected = (
        [float(text.replace(",", "")) for text in re.findall(number, output)]
        for output in (done.stdout, shown)
    )
    assert printed == pytest.approx(expected, rel=0.02)


def test_the_schedule_is_the_one_that_the_command_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "1f1b"]) == 0
    drawn = "\n".join(capsys.readouterr().out.splitlines()[:5])
    assert drawn in README
    assert drawn in (ROOT / "docs" / "concepts" / "how_it_works.md").read_text(encoding="utf-8")


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search("RESULTS|OUTPUT|TODO", README)


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 155


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(ROOT / "configs" / "digits.yaml"), "--diff"]) == 0
    capsys.readouterr()
    commands = set(re.findall(r"(?:^|`|&& )(gpipe|nas)[ \n](\w+)", README, re.MULTILINE))
    assert {("gpipe", "train"), ("gpipe", "schedule"), ("nas", "search")} <= commands
    for program, command in commands:
        with pytest.raises(SystemExit, match="0"):
            (cli if program == "gpipe" else nas_cli).main([command, "--help"])


def test_the_box_lists_every_command() -> None:
    row = re.search(r"\| \[Commands\]\(.*?\) \| (.*) \|", README)
    assert row
    for program, parser in (("gpipe", cli.parser()), ("nas", nas_cli._parser())):
        (listed,) = (part for part in row[1].split("; ") if part.startswith(f"`{program} "))
        (commands,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
        assert set(re.findall(r"[\w-]+", listed)) - {program} == set(commands)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    head = re.split(r"\n\w+:", path.read_text())[0]
    if f"nas search configs/{path.name}" in head:
        loader.load_as(SearchConfig, path)
    else:
        loader.load(path)
        assert f"gpipe train configs/{path.name}" in head
    assert re.search(r"minute|second", head), "no time"
    assert re.search(r"accuracy|bits per byte", head), "no expected result"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
