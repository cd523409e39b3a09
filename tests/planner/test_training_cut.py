"""Check that a plan says where a training of the same config is cut otherwise."""

import optax
import pytest
from paths import REPOSITORY

import gpipe_jax as gpipe
from gpipe_jax.planner import planner, predict, search
from gpipe_jax.training import from_config

CONFIG = {
    "model": {"kind": "convnet", "widths": [4, 8, 16], "depths": [2, 2, 3]},
    "data": {"kind": "digits", "batch_size": 32},
    "mesh": {"stages": 4},
    "pipeline": {"micro_batches": 4},
}
SMALL = {"model": {"kind": "mlp", "features": [64, 8, 10]}, "data": {"kind": "digits"}}


def test_both_cuts_are_named(tmp_path):
    """Name the cut of `gpipe train` on this CPU; with the remedy, it trains with the plan's."""
    config = gpipe.load(CONFIG)
    trained = list(from_config.assemble(config, tmp_path).trainer.pipe.partition.boundaries)
    plan = planner.plan(config)
    planned = plan.layout["partition"]
    assert trained != planned
    (warning,) = plan.warnings
    assert warning.startswith(
        f"gpipe train on CPU devices cuts before layers {trained}, this plan before {planned}, "
        f"because training balances operations, counted for cpu, and the plan operations, counted "
        f"for tpu; pipeline.partition={planned}, or"
    )
    same = gpipe.load(config, [f"pipeline.partition={planned}"])
    pipe = from_config.assemble(same, tmp_path).trainer.pipe
    assert list(pipe.partition.boundaries) == planned
    assert planner.plan(same).warnings == []


@pytest.mark.parametrize(
    ("compiled", "overrides", "cost", "expected"),
    [
        (False, [], "flops", ["cpu"]),
        (False, ["mesh.simulate=8"], "flops", []),  # it has the costs of that training
        (True, ["mesh.simulate=8"], [1.0] * 8, ["tpu", "cpu"]),
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


def test_a_search_knows_the_memory_of_an_optimizer_with_groups():
    """Check an optimizer that takes the layers' tree only: with groups, it has one more tree."""
    groups = "optimizer={kind: adamw, groups: [{match: ['*.bias'], learning_rate: 0.1}]}"
    shares = [
        search._optimizer_share(planner.from_config(gpipe.load(SMALL, overrides))[0])
        for overrides in ([], [groups], ["optimizer={kind: sgd}"])
    ]
    assert shares == pytest.approx([2, 2, 1], abs=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("text", "amoebanet_digits")),
    ],
)
def test_the_plan_of_a_config_that_simulates_is_that_of_its_training(name, tmp_path, monkeypatch):
    """Compare the cuts, and what both print of their costs."""
    monkeypatch.setattr(from_config, "simulate_devices", lambda _: None)
    config = gpipe.load(REPOSITORY / f"configs/{name}.yaml", ["mesh.data=1"])
    trained = from_config.assemble(config, tmp_path).trainer.pipe
    plan = planner.plan(config)
    assert plan.layout["partition"] == list(trained.partition.boundaries)
    assert not [text for text in plan.warnings if "cuts before" in text]
    assert plan.costs == trained.cost_kind == "operations, counted for cpu"
    assert f"costs: {plan.costs}" in str(plan) and f"costs: {plan.costs}" in str(trained)


@pytest.mark.parametrize(
    "name",
    [
        "transformer_48",
        pytest.param("amoebanet_d_18_256", marks=pytest.mark.slow),
        pytest.param("transformer_128_stages", marks=pytest.mark.slow),
    ],
)
def test_the_plan_of_a_config_for_tpu_is_that_of_its_training(name):
    config = gpipe.load(REPOSITORY / f"configs/{name}.yaml")
    job, layout = planner.from_config(config)
    pipe = job.build_pipeline(layout)
    assert pipe.cost_kind == "operations, counted for tpu"
    assert pipe.partition.boundaries == pipe.cut_on("tpu")
    assert planner.predict.training_cut.warnings(pipe, job, layout, "flops", compiled=True) == []


def test_a_platform_that_does_not_exist():
    job, layout = planner.from_config(gpipe.load(SMALL))
    with pytest.raises(gpipe.errors.ArgumentError, match="must be 'cpu', 'gpu' or 'tpu', got 'a'"):
        job.build_pipeline(layout, platform="a")
