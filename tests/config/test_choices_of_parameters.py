"""Check what configs say of single parameters: what is trained, and groups of the optimizer."""

import json
from pathlib import Path

import pytest

from gpipe_jax.cli.main import main
from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError

TEXT = """\
model:
  kind: mlp
data: {kind: digits}
optimizer:
  kind: adamw
  groups:
    - {match: ["*.bias"], learning_rate: 1e-2}
    - match: ["0"]
      weight_decay: 0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(TEXT)
    return tmp_path / "own.yaml"


def test_groups_of_a_file(file: Path) -> None:
    config = loader.load(file, ['model.frozen=["1", "*.scale"]'])
    first, second = config.optimizer.groups
    assert (first.match, first.settings) == (("*.bias",), {"learning_rate": 0.01})
    assert (second.match, second.settings) == (("0",), {"weight_decay": 0.0})
    assert config.model.training_arguments == {"trainable": None, "frozen": ("1", "*.scale")}
    assert not {"trainable", "frozen"} & config.model.network_arguments().keys()
    again = loader.load({name: dict(section) for name, section in config})
    assert again == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "weight_decay: 0",
            "weight_deca: 0",
            "own.yaml:9: unknown key 'optimizer.groups[1].w",
        ),
        (
            "weight_decay: 0",
            "weight_decay: x",
            "groups[1].weight_decay: expected a number",
        ),
        ("      weight_decay: 0", "", "own.yaml:8: optimizer.groups[1]: sets nothing for the"),
        ('match: ["0"]', "l2: 0", "groups[1].match: required; give patterns of the parameters"),
        ('match: ["0"]', 'match: "0"', "own.yaml:8: optimizer.groups[1].match: expected a list"),
        ('match: ["0"]', "match: []", "groups[1].match: expected a list of at least 1, got []"),
        ("mlp", "mlp\n  frozen: '0'", "own.yaml:3: model.frozen: expected a list, got '0'"),
        ("mlp", "mlp\n  trainable: ['0']\n  frozen: ['1']", "trainable or frozen, not both"),
    ],
)
def test_a_mistake_is_reported_at_its_line(old: str, new: str, message: str, file: Path) -> None:
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        loader.load(file)
    assert message in str(caught.value)


def test_whole_numbers_are_layers(file: Path) -> None:
    overrides = ["model.frozen=[1]", "optimizer.groups=[{match: [0, 2], l2: 0.1}]"]
    config = loader.load(file, overrides)
    assert (config.model.frozen, config.optimizer.groups[0].match) == (("1",), ("0", "2"))


def test_an_item_that_fails_is_one_problem(file: Path) -> None:
    file.write_text(TEXT.replace('["0"]', "[true]"))
    with pytest.raises(ConfigError, match=r"groups\[1\].match\[0\]: expected text") as caught:
        loader.load(file)
    assert len(caught.value.problems) == 1


def test_groups_in_what_the_command_prints(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(file), "--diff", "--json"]) == 0
    changed = json.loads(capsys.readouterr().out)
    assert changed["optimizer.groups"]["value"][0]["match"] == ["*.bias"]
    assert main(["config", str(file), "--diff"]) == 0
    assert "{'match': ['0'], 'weight_decay': 0.0}" in capsys.readouterr().out
    lines = loader.describe_differences(
        loader.compare(loader.load(file), loader.load(file, ["optimizer.groups=[]"]))
    )
    assert lines == [
        "optimizer.groups: [{'learning_rate': 0.01, 'match': ['*.bias']}, {'match': ['0'], "
        "'weight_decay': 0.0}] before, [] now"
    ]
