"""Pictures are made, and show something."""

import sys

import numpy as np
import pytest
from matplotlib import image, pyplot

from gpipe_jax import plots
from gpipe_jax.schedules.generators import KINDS, make


def pixels(path) -> np.ndarray:
    assert path.read_bytes().startswith(b"\x89PNG")
    return image.imread(path)[..., :3]


def hexadecimal(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_shows_its_operations(tmp_path, kind):
    plan = make(kind, 4, 6)
    plots.schedule(plan, tmp_path / "schedule.png")
    picture = pixels(tmp_path / "schedule.png")
    share = {}
    for operation, colour in plots.COLOURS.items():
        share[operation] = (np.abs(picture - hexadecimal(colour)).max(-1) < 0.02).mean()
    count = {op: (plan.table[..., 0] == op).mean() for op in plots.COLOURS}
    assert share[plots.FORWARD] > 0.2 * count[plots.FORWARD] > 0
    if kind != "forward":  # as many backwards as forwards, up to the text in the boxes
        assert share[plots.BACKWARD] == pytest.approx(share[plots.FORWARD], rel=0.1)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 200)])
def test_schedules_of_any_size(tmp_path, stages, micro_batches):
    plots.schedule(make("1f1b", stages, micro_batches), tmp_path / "schedule.png")
    assert pixels(tmp_path / "schedule.png").std() > 0.01


def test_curves_of_loss_and_accuracy(tmp_path):
    records = [{"step": s, "loss": 1 / s, "accuracy": 1 - 1 / s} for s in range(1, 9)]
    records += [{"step": 8, "test_loss": 0.2, "test_accuracy": 0.9}]
    plots.curves(records, tmp_path / "both.png")
    plots.curves([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    both, loss = pixels(tmp_path / "both.png"), pixels(tmp_path / "loss.png")
    assert both.shape[1] == pytest.approx(2 * loss.shape[1], rel=0.01)
    assert both.std() > 0.05 and loss.std() > 0.05


def test_a_notebook_keeps_its_settings(tmp_path):
    before = pyplot.get_backend(), pyplot.get_fignums()
    plots.schedule(make("gpipe", 2, 2), tmp_path / "schedule.png")
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


def test_without_matplotlib_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpipe-jax\[examples\]'"):
        plots.schedule(make("gpipe", 2, 2), tmp_path / "schedule.png")
