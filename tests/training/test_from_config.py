"""Check what a config says of parameters: in a training, in its plan, and in a resumed run."""

from pathlib import Path

import pytest

import gpipe_jax as gpipe
from gpipe_jax.cli.main import main
from gpipe_jax.errors import SectionError
from gpipe_jax.planner import job
from gpipe_jax.training import from_config
from gpipe_jax.training.grouping.transformation import GroupedState

CONFIG = """\
model: {kind: mlp, features: [64, 8, 8, 10], frozen: ["1"]}
data: {kind: digits, batch_size: 16}
mesh: {stages: 2}
pipeline: {micro_batches: 2}
optimizer: {kind: adamw, groups: [{match: ["*.bias"], learning_rate: 1e-2}]}
train: {steps: 2, eval_every: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "own.yaml").write_text(CONFIG)
    return str(tmp_path / "own.yaml")


def test_training_and_plan_agree(file: str, tmp_path: Path) -> None:
    config = gpipe.load(file)
    trained = from_config.assemble(config, tmp_path / "run").trainer
    planned_job, layout = job.from_config(config)
    planned = planned_job.build_trainer(layout)
    for trainer in (trained, planned):
        assert "72 frozen" in str(trainer.pipe)
        assert isinstance(trainer.train_step.local_shapes.opt_state, GroupedState)
    assert trained.device_bytes() == planned.device_bytes()


@pytest.mark.parametrize(
    ("override", "section", "problem"),
    [
        ("model.frozen=[dens]", "model", "`frozen` has patterns .*did you mean 'Dense'"),
        ("optimizer.groups=[{match: ['1'], l2: 1}]", "optimizer", "`groups` has patterns"),
    ],
)
def test_unknown_patterns_are_problems_of_their_sections(
    override: str, section: str, problem: str, file: str, tmp_path: Path
) -> None:
    config = gpipe.load(file, [override])
    with pytest.raises(SectionError, match=problem) as caught:
        from_config.assemble(config, tmp_path / "run")
    assert caught.value.section == section
    assert main(["plan", file, override]) == 2


def test_a_run_resumes_with_the_same_patterns_only(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run = ["train", file, f"train.workdir={folder}"]
    assert main(run) == 0
    assert main([*run, "train.steps=3", 'model.frozen=["0"]', "optimizer.groups=[]"]) == 2
    problems = capsys.readouterr().err
    assert "model.frozen: ['1'] before, ['0'] now" in problems
    assert "optimizer.groups: [{'learning_rate': 0.01" in problems
    assert main(["eval", str(folder), "--stages", "1"]) == 0
    assert main(["export", str(folder), "--out", str(tmp_path / "own.npz")]) == 0
    assert main([*run, "train.steps=3", "mesh.stages=1"]) == 0
