"""Run the example projects as a user does: in a copy, by commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from paths import REPOSITORY


def gpipe(folder: Path, *words: str) -> str:
    """Run a command in a folder; return its last line."""
    command = [sys.executable, "-m", "gpipe_jax", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_own_project(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(REPOSITORY / "examples" / "own_project", folder)
    few = ["model.arguments={width: 8, depth: 2}", "train.steps=6", "train.eval_every=3"]
    end = "train.callbacks=[{function: model.py:stop_below, arguments: {error: 1e9}}]"
    # A callback ends the run at its first evaluation, and again when it is resumed.
    for _ in range(2):
        figures = json.loads(gpipe(folder, "train", "config.yaml", "--json", *few, end))
        assert figures["steps"] == 3 and figures["stages"] == 2
    evaluated = json.loads(gpipe(tmp_path, "eval", "project/runs/config", "--json"))
    assert evaluated["test_mean_error"] == figures["test_mean_error"]
    gpipe(folder, "export", "runs/config", "--out", "w.npz")
    assert np.load(folder / "w.npz")["layers.0.kernel"].shape == (8, 8)
    plan = json.loads(gpipe(tmp_path, "plan", "project/config.yaml", "--json", *few))
    assert plan["layout"]["stages"] == 2 and len(plan["stages"]) == 2
