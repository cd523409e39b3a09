"""What the README says is true: its example runs, its figures and its commands are real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY as ROOT

from gpipe_jax.cli import main as cli
from gpipe_jax.config import loader
from gpipe_jax.schedules import generators, schedule, simulation
from nas import cli as nas_cli
from nas.config import SearchConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    check = "assert float(loss) > 0 and len(pipe.to_layers(grads)) == len(layers)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "4 devices x 2 replicas" in done.stdout


def test_nothing_is_left_to_fill_in() -> None:
    assert "RESULTS" not in README


def simulated_time(plan: schedule.Schedule) -> float:
    """Of one step, in forward times of a device; the last stage's forward is in its backward."""
    count, V = plan.num_devices * plan.chunks, plan.chunks
    forward = [*[1 / V] * (count - 1), 0.0]
    return simulation.simulate(plan, forward, [3 / V] * count).time


def test_the_table_of_schedules() -> None:
    plans = [generators.make(kind, 8, 32) for kind in ("gpipe", "1f1b", "eager_1f1b")]
    plans.append(generators.interleaved(8, 32, 2))
    times = [simulated_time(plan) for plan in plans]
    row = re.search(r"\| time of a step.*?\|(.*)\|", README)
    assert row and row[1].replace("|", " ").split() == [f"{time:.0f}" for time in times]
    row = re.search(r"\| stage inputs stashed.*?\|(.*)\|", README)
    assert row and [int(v) for v in row[1].split("|")] == [max(p.peak_stash) for p in plans]


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", "--stages", "4", "--micro-batches", "8", "--kind", "1f1b"]) == 0
    assert cli.main(["config", str(ROOT / "configs" / "digits.yaml"), "--diff"]) == 0
    assert "stage 3" in capsys.readouterr().out
    for program, command in re.findall(r"^(gpipe|nas) (\w+)", README, re.MULTILINE):
        with pytest.raises(SystemExit, match="0"):
            (cli if program == "gpipe" else nas_cli).main([command, "--help"])


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


@pytest.mark.parametrize("name", re.findall(r"`((?:\w+/)+|(?:\w+/)*\w+\.(?:py|yaml))`", README))
def test_every_file_it_names_is_there(name: str) -> None:
    assert (ROOT / name).exists() or (ROOT / "gpipe_jax" / name).exists()
