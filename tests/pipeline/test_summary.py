"""Check the table and the facts of a pipeline."""

import re

import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.pipeline import summary


@pytest.fixture(scope="module")
def pipe() -> gpipe.Pipeline:
    return gpipe.Pipeline(
        gpipe.zoo.mlp((4, 8, 8, 8, 3)),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2, data=2),
        example={"inputs": np.zeros((24, 4), np.float32), "labels": np.zeros(24, np.int32)},
        micro_batches=3,
        partition=[3],
        cost=[1, 1, 1, 1],
    )


def test_a_row_for_each_stage(pipe):
    header, rule, first, second, *_ = str(pipe).splitlines()
    assert re.split(r"  +", header) == [*summary.STAGE_HEADER, "output"]
    assert set(rule) == {"-", " "}
    parameters = 4 * 8 + 8 + 2 * (8 * 8 + 8)
    expected = ["0", "0-2", str(pipe.layers[0]), "75.0%", str(parameters), "128 B"]
    assert re.split(r"  +", first) == expected
    assert re.split(r"  +", second) == ["1", "3", str(pipe.layers[3]), "25.0%", "27", "48 B"]


def test_facts_of_the_whole(pipe):
    facts = pipe.summary().facts
    assert facts["mesh"] == "2 devices x 2 replicas"
    assert facts["batch"] == "24 examples in 3 micro-batches of 4 on each replica"
    assert "slowest stage 1.500 of the mean" in facts["balance"]
    assert "lower bound 0.667 of the slowest" in facts["balance"]
    assert facts["schedule"].startswith("1f1b, 8 ticks, bubble 25.0% of the slots")
    assert facts["stash"] == "2 boundary inputs, 256 B on each device"
    padding = re.search(r"([\d.]+)% of it padding", facts["parameters"])
    own = [pipe.stages.geometry.parameter_bytes(k) for k in range(2)]
    device = pipe.stages.params.device_bytes()
    assert padding and float(padding[1]) == pytest.approx(100 - 50 * sum(own) / device, abs=0.06)
    assert facts["boundaries"] == "all equal, not packed"
    assert str(pipe).endswith("\n".join(f"{name}: {fact}" for name, fact in facts.items()))


def test_stages_of_several_chunks():
    """Check four stages on two devices; one shares the parameters of the first."""
    layers = gpipe.zoo.mlp((4, 4, 4, 4, 4))
    layers[0], layers[2] = (a.tie("w", "linear.kernel") for a in (layers[0], layers[2]))
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example={"inputs": np.zeros((24, 4), np.float32), "labels": np.zeros(24, np.int32)},
        micro_batches=4,
        schedule="interleaved",
        chunks=2,
        cost=[1, 1, 1, 1],
    )
    _, _, *rows = str(pipe).splitlines()
    cells = [re.split(r"  +", row) for row in rows[:4]]
    assert [cell[:2] for cell in cells] == [["0", "0"], ["1", "1"], ["2", "2"], ["3", "3"]]
    assert [cell[4] for cell in cells] == ["20", "20", "4", "20"]
    facts = pipe.summary().facts
    assert facts["mesh"] == "2 devices x 1 replicas, 2 stages on each device"
    assert facts["schedule"].startswith("interleaved, 18 ticks, bubble 11.1% of the slots")
    assert facts["stash"] == "4 boundary inputs, 384 B on each device"
    own, device = [4 * (20 + 4), 4 * (20 + 20)], pipe.stages.params.device_bytes()
    assert f"{1 - sum(own) / (2 * device):.1%} of it padding" in facts["parameters"]
    assert device >= max(own)


def test_html_says_the_same(pipe):
    html = pipe._repr_html_()
    assert html.count("<tr>") == 3 and html.count("<th>") == len(summary.STAGE_HEADER) + 1
    for fact in pipe.summary().facts.values():
        assert fact in html


def test_html_is_escaped():
    def init(key, x):
        return {}

    def apply(params, x):
        return x

    apply.__name__ = "<b>&"
    pipe = gpipe.Pipeline(
        [gpipe.layer(init, apply)],
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=1),
        example={"inputs": np.zeros((2, 1)), "labels": np.zeros((2, 1))},
    )
    assert "&lt;b&gt;&amp;" in pipe._repr_html_() and "<b>" not in pipe._repr_html_()
