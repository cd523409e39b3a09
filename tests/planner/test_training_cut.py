"""Check that a plan says where a training of the same config is cut otherwise."""

import optax
import pytest

import gpipe_jax as gpipe
from gpipe_jax.planner import planner, predict
from gpipe_jax.training import from_config

CONFIG = {
    "model": {"kind": "convnet", "widths": [4, 8, 16], "depths": [2, 2, 3]},
    "data": {"kind": "digits", "batch_size": 32},
    "mesh": {"stages": 4},
    "pipeline": {"micro_batches": 4},
}


def test_both_cuts_are_named(tmp_path):
    """Name the cut of `gpipe train` on this CPU; with the remedy, it trains with the plan's."""
    config = gpipe.load(CONFIG)
    trained = list(from_config.assemble(config, tmp_path).trainer.pipe.partition.boundaries)
    plan = planner.plan(config)
    planned = plan.layout["partition"]
    assert trained != planned
    (warning,) = plan.warnings
    assert warning.startswith(
        f"gpipe train on CPU devices cuts before layers {trained} (pipeline.cost: flops), this "
        f"plan before {planned}; pipeline.partition={planned}, or"
    )
    same = gpipe.load(config, [f"pipeline.partition={planned}"])
    pipe = from_config.assemble(same, tmp_path).trainer.pipe
    assert list(pipe.partition.boundaries) == planned
    assert planner.plan(same).warnings == []


@pytest.mark.parametrize(
    ("compiled", "overrides", "cost", "expected"),
    [
        (False, [], "flops", ["cpu"]),
        (True, [], "flops", []),  # it is for a TPU, and has the costs of one
        (True, ["mesh.simulate=8"], "flops", ["cpu"]),
        (True, [], [1.0] * 8, ["tpu"]),  # of another kind than the config's
        (True, ["pipeline.cost=time"], "flops", []),  # the plan says that it measures nothing
    ],
)
def test_the_trainings_that_are_compared(compiled, overrides, cost, expected, monkeypatch):
    config = gpipe.load(CONFIG, overrides)
    job, layout = planner.from_config(config)
    pipe, asked = job.build_trainer(layout).pipe, []

    def cut_on(platform: str, cost: object) -> tuple[int, ...]:
        asked.append(platform)
        return (1, 2, 3)

    monkeypatch.setattr(pipe, "cut_on", cut_on)
    found = predict.training_cut.warnings(pipe, job, layout, cost, compiled=compiled)
    assert asked == expected and len(found) == len(expected)


@pytest.mark.parametrize("cost", [None, [1.0] * 9])
def test_a_training_by_measured_time_may_be_cut_elsewhere(cost):
    config = gpipe.load(CONFIG, ["pipeline.cost=time"])
    (warning,) = planner.plan(config, cost=cost).warnings
    assert warning == (planner.UNTIMED if cost is None else planner.TRAINED_BY_TIME)
    cut = gpipe.load(config, ["pipeline.partition=[1,2,3]"])
    assert planner.TRAINED_BY_TIME not in planner.plan(cut, cost=cost).warnings


def test_layers_alone_have_no_training_to_compare():
    batch = next(gpipe.data.digits(batch_size=32, seed=0).train(0))
    layers = gpipe.zoo.mlp((64, 32, 10))
    loss = gpipe.losses.softmax_cross_entropy
    plan = gpipe.plan(layers, loss=loss, example=batch, tx=optax.sgd(1), stages=2)
    assert plan.warnings == []
