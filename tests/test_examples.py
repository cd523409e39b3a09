"""Run the example projects as a user does: in a copy, by commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import REPOSITORY


def gpipe(folder: Path, *words: str) -> str:
    """Run a command in a folder; return its last line."""
    command = [sys.executable, "-m", "gpipe_jax", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


FEW = ["model.arguments={width: 8, depth: 2}", "train.steps=6", "train.eval_every=3"]
END = "train.callbacks=[{function: model.py:stop_below, arguments: {error: 1e9}}]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "project"
    shutil.copytree(REPOSITORY / "examples" / "own_project", copy)
    return copy


def train(folder: Path) -> dict:
    """Train until a callback ends the run, at its first evaluation."""
    figures = json.loads(gpipe(folder, "train", "config.yaml", "--json", *FEW, END))
    assert figures["steps"] == 3 and figures["stages"] == 2
    return figures


def test_own_project(folder: Path) -> None:
    figures = train(folder)
    evaluated = json.loads(gpipe(folder.parent, "eval", "project/runs/config", "--json"))
    assert evaluated["test_mean_error"] == figures["test_mean_error"]
    gpipe(folder, "export", "runs/config", "--out", "w.npz")
    assert np.load(folder / "w.npz")["layers.0.kernel"].shape == (8, 8)


@pytest.mark.slow
def test_own_project_resumes_and_is_planned(folder: Path) -> None:
    assert train(folder)["test_mean_error"] == train(folder)["test_mean_error"]
    plan = json.loads(gpipe(folder.parent, "plan", "project/config.yaml", "--json", *FEW))
    assert plan["layout"]["stages"] == 2 and len(plan["stages"]) == 2
