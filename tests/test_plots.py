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


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_shows_its_operations(tmp_path, kind):
    plan = make(kind, 4, 6, 2 if kind == "interleaved" else 1)
    figure = plots.schedule(plan, tmp_path / "schedule.png")
    picture = pixels(tmp_path / "schedule.png")
    share = {}
    for operation, colour in plots.COLOURS.items():
        share[operation] = (np.abs(picture - hexadecimal(colour)).max(-1) < 0.02).mean()
    assert share[plots.FORWARD] > 0.02
    if kind in ("gpipe", "1f1b", "eager_1f1b"):
        # A backward is three times as long, and the last device's forwards are part of them.
        expected = 3 * 4 / 3 * share[plots.FORWARD]
        assert share[plots.BACKWARD] == pytest.approx(expected, rel=0.2)
    names = ["forward"] if kind == "forward" else ["forward", "backward"]
    assert legend(figure) == names + (["chunk 0", "chunk 1"] if kind == "interleaved" else [])


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 200), (64, 64)])
def test_schedules_of_any_size(tmp_path, stages, micro_batches):
    figure = plots.schedule(make("1f1b", stages, micro_batches), tmp_path / "schedule.png")
    assert pixels(tmp_path / "schedule.png").std() > 0.01
    width, height = figure.get_size_inches()
    assert 6 <= width <= 24 and height <= 12
    (axes,) = figure.axes
    assert axes.get_yticks().tolist() == list(range(0, stages, 4 if stages == 64 else 1))
    # Numbers are in the boxes that have room for them, and in no others.
    assert len(axes.texts) == {1: 1, 2: 0, 64: 0}[stages]


def test_the_widths_are_the_times_of_the_simulation():
    figure = plots.schedule(make("gpipe", 2, 2))
    forward, backward = figure.axes[0].collections
    boxes = [[path.get_extents() for path in part.get_paths()] for part in (forward, backward)]
    assert [[(box.x0, box.width) for box in part] for part in boxes] == [
        [(0, 1), (1, 1)],
        [(2, 3), (5, 3), (5, 3), (8, 3)],
    ]


def test_a_legend_of_many_chunks_names_some():
    assert legend(plots.schedule(make("forward", 2, 2, 20))) == [
        *("forward", "chunk 0", "chunk 10", "chunk 19")
    ]


def test_curves_of_loss_and_accuracy(tmp_path):
    records = [{"step": s, "loss": 1 / s, "accuracy": 1 - 1 / s} for s in range(1, 9)]
    records += [{"step": 8, "test_loss": 0.2, "test_accuracy": 0.9}]
    plots.curves(records, tmp_path / "both.png")
    plots.curves([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    both, loss = pixels(tmp_path / "both.png"), pixels(tmp_path / "loss.png")
    assert both.shape[1] == pytest.approx(2 * loss.shape[1], rel=0.01)
    assert both.std() > 0.05 and loss.std() > 0.05


def test_a_picture_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plots.schedule(make("gpipe", 1, 1), "~/a picture")
    assert pixels(tmp_path / "a picture").std() > 0.01
    with pytest.raises(ValueError, match="`path` s3://a/b: s3:// addresses are not supported"):
        plots.schedule(make("gpipe", 1, 1), "s3://a/b")


def test_a_notebook_keeps_its_settings(tmp_path):
    before = pyplot.get_backend(), pyplot.get_fignums()
    plots.schedule(make("gpipe", 2, 2), tmp_path / "schedule.png")
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


def test_without_matplotlib_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gpipe-jax\[examples\]'"):
        plots.schedule(make("gpipe", 2, 2), tmp_path / "schedule.png")
