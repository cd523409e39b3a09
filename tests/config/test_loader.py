"""Check every message of the loader, and that it raises nothing but `ConfigError`."""

import os
import random
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import yaml
from pydantic import Field

from gpipe_jax.config import loader, messages
from gpipe_jax.config.base import Configuration, Section
from gpipe_jax.config.loader import load, load_as
from gpipe_jax.config.optimizers import AdamConfig, SgdConfig
from gpipe_jax.config.run import Config, MeshConfig
from gpipe_jax.errors import ConfigError, SectionError
from nas.config import SearchConfig

BASE = """\
model:
  kind: convnet
data:
  kind: digits
"""
SECTIONS = "model, data, loss, mesh, pipeline, optimizer, train, profile"
SGD = "optimizer:\n  kind: sgd\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load_text(text: str, *overrides: str) -> Config:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load("x.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, *overrides)
    return list(caught.value.problems)


# ---- what works ---------------------------------------------------------------------------------


def test_sources_agree():
    config = load_text(BASE + "mesh:\n  stages: 2\n")
    values = {"model": {"kind": "convnet"}, "data": {"kind": "digits"}, "mesh": {"stages": 2}}
    assert load(Path("x.yaml")) == load(values) == load(config) == config
    assert load({**values, "mesh": MeshConfig(stages=2)}) == config


def test_overrides_do_not_change_the_source():
    values = {"model": {"kind": "convnet"}, "data": {"kind": "digits"}, "mesh": {"stages": 1}}
    assert load(values, ["mesh.stages=2"]).mesh.stages == 2
    assert values["mesh"] == {"stages": 1}
    nested = {**values, "mesh": MeshConfig()}
    assert load(nested, ["mesh.stages=2"]).mesh.stages == 2
    assert nested["mesh"] == MeshConfig()


def test_numbers_coerce_by_the_declared_type():
    text = BASE + SGD + "  learning_rate: 3e-4\n  momentum: 0\n"
    assert yaml.safe_load(text)["optimizer"]["learning_rate"] == "3e-4"  # the trap
    optimizer = load_text(text, "optimizer.weight_decay=1e-5").optimizer
    assert optimizer == SgdConfig(learning_rate=3e-4, momentum=0.0, weight_decay=1e-5)


def test_overrides():
    config = load_text(
        BASE,
        "mesh.stages=3",
        "--mesh.data=2",
        "pipeline.partition=[1, 4]",
        "pipeline.memory_limit_gib=",
        "optimizer={kind: adam, b1: 0.8}",
        "train.workdir=2024-01-01",
        "train.steps=5",
        "train.steps=6",
    )
    assert config.mesh == MeshConfig(stages=3, data=2)
    assert config.pipeline.partition == (1, 4)
    assert config.pipeline.memory_limit_gib is None
    assert config.optimizer == AdamConfig(kind="adam", b1=0.8)
    assert (config.train.workdir, config.train.steps) == ("2024-01-01", 6)


@pytest.mark.parametrize("text", ["=", "<<", "2024-01-01", "a b"])
def test_text_that_yaml_would_make_something_else(text: str):
    assert load_text(BASE + f"train:\n  workdir: {text}\n").train.workdir == text


def test_an_empty_section_means_its_defaults():
    text = BASE + "mesh:\noptimizer:\npipeline: {}\n"
    assert load_text(text) == load_text(BASE)
    assert load_text(text, "mesh.stages=2").mesh.stages == 2


def test_a_byte_order_mark_and_windows_lines():
    assert load_text("\ufeff" + BASE.replace("\n", "\r\n")) == load_text(BASE)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model={kind: mlp}", "optimizer={kind: rmsprop, eps: 1e-10}", "pipeline.cost=[1, 0.5]"],
        ["model={kind: transformer_lm}", "data={kind: text, source: '1: # é'}", "optimizer="],
        ["mesh.stages=3", "pipeline.partition=[1, 2]", "train.workdir='null'", "mesh.simulate=9"],
        [
            "model={kind: amoebanet, genotype: 'my A.json', image: 8, in_channels: 1, classes: 10}",
            "pipeline={schedule: interleaved, chunks: 2, keys_per: example}",
        ],
    ],
)
def test_dump_and_load_round_trip(overrides: list[str]):
    config = load_text(BASE, *overrides)
    text = loader.dump(config)
    assert load_text(text) == config
    assert loader.dump(load_text(text)) == text


def test_non_defaults():
    assert loader.non_defaults(load_text(BASE)) == {}
    config = load_text(BASE + SGD + "  momentum: 0.5\n", "data.batch_size=32")
    assert loader.non_defaults(config) == {
        "data.batch_size": (64, 32),
        "optimizer.kind": ("adamw", "sgd"),
        "optimizer.momentum": (0.9, 0.5),
    }


def test_compare():
    before = load_text(BASE, "optimizer={kind: sgd, learning_rate: 0.1}", "pipeline.cost=[1, 2]")
    now = load_text(BASE, "optimizer={kind: sgd, learning_rate: 0.2}", "train.workdir=runs/a")
    assert loader.compare(before, before) == {}
    differences = loader.compare(before, now)
    assert differences == {
        "pipeline.cost": ((1.0, 2.0), "flops"),
        "optimizer.learning_rate": (0.1, 0.2),
        "train.workdir": (None, "runs/a"),
    }
    assert loader.describe_differences(differences) == [
        "pipeline.cost: [1.0, 2.0] before, 'flops' now",
        "optimizer.learning_rate: 0.1 before, 0.2 now",
        "train.workdir: nothing before, 'runs/a' now",
    ]
    other_kind = loader.compare(before, load_text(BASE))
    assert other_kind["optimizer.b1"] == (loader.ABSENT, 0.9)
    assert "optimizer.b1: absent before, 0.9 now" in loader.describe_differences(other_kind)


def test_compare_sees_what_it_does_not_print():
    long = [1.0] * 100
    before, now = (load_text(BASE, f"pipeline.cost={[*long, last]}") for last in (1, 2))
    assert len(loader.compare(before, now)) == 1


def test_settings_without_effect_are_legal_and_no_difference():
    dead = ["optimizer.decay_rate=0.5", "optimizer.staircase=true", "profile={start: 5, steps: 0}"]
    config = load_text(BASE + SGD, *dead)
    assert loader.without_effect(config) == [
        "optimizer.decay_rate has no effect with optimizer.schedule cosine",
        "optimizer.staircase has no effect with optimizer.schedule cosine",
        "profile.start has no effect with profile.steps 0",
    ]
    assert load_text(loader.dump(config)) == config
    plain = load_text(BASE + SGD)
    assert loader.without_effect(plain) == []
    assert loader.compare(config, plain) == {}
    alive = load_text(BASE + SGD, *dead, "optimizer.schedule=exponential", "profile.steps=1")
    assert loader.without_effect(alive) == []
    assert len(loader.compare(plain, alive)) == 5


def test_schema():
    properties = loader.schema()["$defs"]["MeshConfig"]["properties"]
    assert properties["stages"]["default"] == 1
    assert properties["stages"]["minimum"] == 1


def test_numbers_of_numpy_are_numbers():
    values = {
        "model": {"kind": "mlp", "features": [np.int64(64), np.uint8(10)]},
        "data": {"kind": "digits"},
        "pipeline": {"partition": np.array([1]), "cost": (np.float32(0.5), np.int32(1))},
        "mesh": {"stages": np.int32(2)},
        "optimizer": {"kind": "sgd", "nesterov": np.bool_(True), "learning_rate": np.float64(0.1)},
    }
    config = load(values)
    assert config.model.features == (64, 10) and config.mesh == MeshConfig(stages=np.int64(2))
    assert (config.pipeline.partition, config.pipeline.cost) == ((1,), (0.5, 1.0))
    assert config.optimizer == SgdConfig(nesterov=True, learning_rate=0.1)
    assert load_text(loader.dump(config)) == config
    with pytest.raises(ConfigError, match=r"mesh.stages: expected a whole number, got True"):
        load({**values, "mesh": {"stages": np.bool_(True)}})


def test_a_config_is_found_from_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    written = load_text(BASE)
    assert load("~/x.yaml") == load("$HOME/x.yaml") == load(Path("${HOME}/x.yaml")) == written


# ---- what does not ------------------------------------------------------------------------------

MLP = "model: {kind: mlp}\ndata: {kind: digits}\n"  # two lines, so that additions start on line 3

MESSAGES = [
    # values
    ("optimizer: {kind: sgd, learning_rate: abc}", "optimizer.learning_rate: expected a number, got 'abc'"),  # noqa: E501
    ("optimizer: {kind: sgd, learning_rate: -1}", "optimizer.learning_rate: expected more than 0, got -1"),  # noqa: E501
    ("optimizer: {kind: sgd, learning_rate: .nan}", "optimizer.learning_rate: expected a finite number, got nan"),  # noqa: E501
    ("optimizer: {kind: sgd, learning_rate: inf}", "optimizer.learning_rate: expected a finite number, got 'inf'"),  # noqa: E501
    ("optimizer: {kind: sgd, momentum: 1}", "optimizer.momentum: expected less than 1, got 1"),
    ("optimizer: {kind: sgd, momentum: }", "optimizer.momentum: expected a number, got nothing"),
    ("optimizer: {kind: sgd, nesterov: 3}", "optimizer.nesterov: expected true or false, got 3"),
    ("mesh: {stages: x}", "mesh.stages: expected a whole number, got 'x'"),
    ("mesh: {stages: 1.5}", "mesh.stages: expected a whole number, got 1.5"),
    ("mesh: {stages: .inf}", "mesh.stages: expected a finite number, got inf"),
    ("mesh: {stages: yes}", "mesh.stages: expected a whole number, got True"),
    ("mesh: {stages: 0}", "mesh.stages: expected at least 1, got 0"),
    ("mesh: {stages: 3000000000}", "mesh.stages: expected at most 2147483647, got 3000000000"),
    ("mesh: {stages: {a: 1}}", "mesh.stages: expected a whole number, got {'a': 1}"),
    (f"mesh: {{stages: 0x{'f' * 5000}}}", "mesh.stages: expected at most 2147483647, got a huge number"),  # noqa: E501
    (f"mesh: {{stages: {'9' * 5000}}}", r"mesh.stages: '999*\.\.\.9*' cannot be read as int; correct it or quote it"),  # noqa: E501
    (f"mesh: {{stages: '{'9' * 5000}'}}", r"mesh.stages: expected a smaller whole number, got '999*\.\.\.9*'"),  # noqa: E501
    ("mesh: {stages: !!int abc}", "mesh.stages: 'abc' cannot be read as int; correct it or quote it"),  # noqa: E501
    ("train: {workdir: 3}", "train.workdir: expected text, got 3; put it in quotes"),
    ("train: {workdir: [3]}", "train.workdir: expected text, got [3]"),
    ("train: {workdir: ''}", "train.workdir: expected text, not nothing, got ''"),
    ("pipeline: {schedule: 1f1}", "pipeline.schedule: expected 'gpipe', '1f1b', 'eager_1f1b' or 'interleaved', got '1f1'; did you mean '1f1b'?"),  # noqa: E501
    ("pipeline: {partition: 3}", "pipeline.partition: expected 'auto' or a list, got 3"),
    ("pipeline: {partition: aut}", "pipeline.partition: expected 'auto' or a list, got 'aut'; did you mean 'auto'?"),  # noqa: E501
    ("pipeline: {partition: [1, x]}", "pipeline.partition[1]: expected a whole number, got 'x'"),
    ("pipeline: {partition: [2, 1]}", "pipeline.partition: boundaries must be strictly increasing, got 1 after 2 in [2, 1]"),  # noqa: E501
    ("pipeline: {chunks: 2}", "pipeline.chunks: chunks 2 need pipeline.schedule 'interleaved', got '1f1b'; use that schedule, or one chunk"),  # noqa: E501
    ("pipeline: {keys_per: batch}", "pipeline.keys_per: expected 'micro_batch' or 'example', got 'batch'; did you mean 'micro_batch'?"),  # noqa: E501
    ("pipeline: {cost: [1, -2]}", "pipeline.cost[1]: expected at least 0, got -2"),
    ("train: {steps: 010}", "train.steps: YAML reads 010 as octal, 8; write 8 or 10, or quote it if it is text"),  # noqa: E501
    ("train: {steps: -0_17}", "train.steps: YAML reads -0_17 as octal, -15; write -15 or -17, or quote it if it is text"),  # noqa: E501
    ("train: {steps: 007}", "train.steps: YAML reads 007 as octal, 7; write 7, or quote it if it is text"),  # noqa: E501
    ("train: {steps: 1:30}", "train.steps: YAML reads 1:30 in base 60, as 90; write 90, or quote it if it is text"),  # noqa: E501
    ("optimizer: {kind: sgd, learning_rate: 1:30.5}", "optimizer.learning_rate: YAML reads 1:30.5 in base 60, as 90.5; write 90.5, or quote it if it is text"),  # noqa: E501
    ("train: {workdir: s3://a/b}", "train.workdir: got 's3://a/b', but s3:// addresses are not supported; give a path on this machine or a gs:// address"),  # noqa: E501
    # structure
    ("mesh: 3", "mesh: expected a mapping (lines of 'key: value'), got 3"),
    ("mesh: [3]", "mesh: expected a mapping (lines of 'key: value'), got [3]"),
    ("optimizer: [sgd]", "optimizer: expected a mapping (lines of 'key: value'), got ['sgd']"),
    ("1: 2", "expected a name before the colon, got '1'; correct it"),
    ("[a]: 2", "expected a name before the colon, got a list; correct it"),
    ("{a: 1}: 2", "expected a name before the colon, got a mapping; correct it"),
    ("mesh: {yes: 2}", "expected a name before the colon, got 'yes'; correct it"),
    ("mesh: {stages: 1, stages: 2}", "'mesh.stages' is given twice, on lines 3 and 3; keep one"),
    ("model: {kind: mlp}", "'model' is given twice, on lines 1 and 3; keep one"),
    ("mesh: &a {stages: *a}", "aliases are not supported, got *a; write the value out"),
    ("mesh: &a\n  stages: 3", None),
    ("mesh: {stages: !!python/object/apply:os.system [ls]}", "mesh.stages: tag !!python/object/apply:os.system is not supported; remove it"),  # noqa: E501
    ("mesh: !mine {stages: 3}", "mesh: tag !mine is not supported; remove it"),
    ("train: {workdir: !!binary aGk=}", "train.workdir: tag !!binary is not supported; remove it"),
    ("mesh: " + "[" * 500, "nested more than 20 levels deep, expected three"),
    ("mesh: {<<: {stages: 2}}", "expected a name before the colon, got '<<'; correct it"),
    ("mesh: @", "not YAML: while scanning for the next token, found character '@' that cannot start any token"),  # noqa: E501
    ("mesh: \x01", r"character '\x01' is not legal in YAML; remove it"),
    ("mesh: *b", "aliases are not supported, got *b; write the value out"),
    # keys
    ("mehs: {stages: 3}", "unknown key 'mehs'; did you mean 'mesh'?"),
    ("qqq: 3", f"unknown key 'qqq'; legal keys: {SECTIONS}"),
    ("learning_rate: 3", "unknown key 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
    ("mesh: {stagse: 3}", "unknown key 'mesh.stagse'; did you mean 'mesh.stages'?"),
    ("mesh: {micro_batches: 3}", "unknown key 'mesh.micro_batches'; did you mean 'pipeline.micro_batches'?"),  # noqa: E501
    ("mesh: {qqq: 3}", "unknown key 'mesh.qqq'; legal keys: stages, data, simulate"),
    ('mesh: {"a\\nb": 3}', r"unknown key 'mesh.a\nb'; legal keys: stages, data, simulate"),
    ("optimizer: {kind: sgd, b1: 0.5}", "'optimizer.b1' belongs to optimizer.kind 'adamw', 'adam', 'lion' or 'muon', not 'sgd'; remove it"),  # noqa: E501
    # kinds
    ("optimizer: {learning_rate: 0.5}", "optimizer.kind: required; give 'sgd', 'adamw', 'adam', 'rmsprop', 'lion', 'muon' or 'python'"),  # noqa: E501
    ("optimizer: {kind: sdg}", "optimizer.kind: expected 'sgd', 'adamw', 'adam', 'rmsprop', 'lion', 'muon' or 'python', got 'sdg'; did you mean 'sgd'?"),  # noqa: E501
    ("optimizer: {kind: adafactor}", "optimizer.kind: adafactor keeps sums over rows and columns, which a checkpoint cannot cut by layers; use lion, with one number per parameter"),  # noqa: E501
    ("optimizer: {kind: [sgd]}", "optimizer.kind: expected 'sgd', 'adamw', 'adam', 'rmsprop', 'lion', 'muon' or 'python', got ['sgd']"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=[text[:40] for text, _ in MESSAGES])
def test_messages(text: str, message: str | None):
    if message is None:
        assert load_text(MLP + text).mesh.stages == 3
        return
    # The two with shortened digits are patterns, all others are literal.
    pattern = message if "9*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=rf"\A1 problem in x.yaml:\nx.yaml:3: {pattern}\Z"):
        load_text(MLP + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: model.kind: required; give 'convnet', 'resnet', 'amoebanet', "),
        ("", "x.yaml:1: data.kind: required; give 'digits', 'text', 'cifar10', "),
        ("# only a comment", "x.yaml:1: data.kind: required; give 'digits', 'text', 'cifar10', "),
        ("\nmodel:\n", "x.yaml:2: model.kind: required; give 'convnet', 'resnet', 'amoebanet', "),
        ("- a", "x.yaml:1: expected sections such as 'model:' and 'data:', got a list"),
        ("\nfoo", "x.yaml:2: expected sections such as 'model:' and 'data:', got a single value"),
        ("!mine {a: 1}", "x.yaml:1: the file: tag !mine is not supported; remove it"),
        ("a: 1\nb: c: d", "x.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: [1", "x.yaml:1: not YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n---\nb: 1", "x.yaml:2: not YAML: expected a single document in the stream"),
        (
            "model:\n  kind: mlp\n  features: [3]\ndata: {kind: digits}",
            "x.yaml:3: model.features: expected a list of at least 2, got [3]",
        ),
        (
            "model:\n  kind: convnet\n  widths: [3]\ndata: {kind: digits}",
            "x.yaml:1: model.depths: needs one entry for each of model.widths: 3 depths",
        ),
        (
            "model:\n  kind: transformer_lm\n  width: 130\n  heads: 4\ndata: {kind: text}",
            "x.yaml:4: model.heads: must divide model.width: width 130 is not a multiple",
        ),
        (
            "data: {kind: digits}\nmodel:\n  kind: amoebanet\n  genotype: E",
            "x.yaml:4: model.genotype: got 'E', but the published ones are A, B, C, D; give one",
        ),
        (
            "data: {kind: digits}\nmodel:\n  kind: amoebanet\n  layers: 8",
            "x.yaml:4: model.layers: must be a multiple of 3, as there are three equal stacks, got "
            "8; nearest legal values: 6, 9",
        ),
        (
            "data: {kind: digits}\nmodel:\n  kind: resnet\n  stem: smal",
            "x.yaml:4: model.stem: expected 'imagenet' or 'small', got 'smal'; did you mean",
        ),
        (
            "data: {kind: digits}\nmodel: {kind: amoebanet, classes: 10, in_channels: 1}",
            "x.yaml:2: model.image: image 224 does not fit data 'digits' (8 x 8 x 1 images); make",
        ),
    ],
)
def test_messages_of_other_files(text: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_text(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.stagse=4", "unknown key 'mesh.stagse'; did you mean 'mesh.stages'?"),
        ("mehs.stages=4", "unknown key 'mehs.stages'; did you mean 'mesh.stages'?"),
        ("stages=4", "unknown key 'stages'; did you mean 'mesh.stages'?"),
        ("qqq=4", f"unknown key 'qqq'; legal keys: {SECTIONS}"),
        ("--mesh.stages=x", "mesh.stages: expected a whole number, got 'x'"),
        ("mesh.stages=", "mesh.stages: expected a whole number, got nothing"),
        ("mesh.stages", "expected section.field=value, such as mesh.stages=4"),
        ("=3", "expected section.field=value, such as mesh.stages=4"),
        ("", "expected section.field=value, such as mesh.stages=4"),
        ("mesh=3", "mesh: expected a mapping (lines of 'key: value'), got 3"),
        ("mesh={stages: 1, stages: 2}", "'mesh.stages' is given twice; keep one"),
        ("mesh={stages: x}", "mesh.stages: expected a whole number, got 'x'"),
        ("model.widths.foo=3", "'model.widths' is a value, not a section; give it as a whole"),
        ("model.qqq.foo=3", "unknown key 'model.qqq'; legal keys: kind, trainable"),
        ("model..=3", "unknown key 'model.'; legal keys: kind, trainable"),
        ("mesh.stages=[1", "not YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("mesh.stages=\udcff", r"character '\udcff' is not legal in YAML; remove it; try quotes"),
        ("mesh.stages=*a", "aliases are not supported, got *a; write the value out"),
        ("mesh.stages=!!python/name:a", "mesh.stages: tag !!python/name:a is not supported"),
        ("model.kind=mpl", "model.kind: expected 'convnet', 'resnet', 'amoebanet', "),
        ("model.kind=", "model.kind: expected 'convnet', 'resnet', 'amoebanet', "),
        ("model=", "model.kind: required; give 'convnet', 'resnet', 'amoebanet', "),
        ("mesh.simulate=1.5", "mesh.simulate: expected a whole number, got 1.5"),
    ],
)
def test_messages_of_overrides(override: str, message: str):
    pattern = re.escape(f"1 problem in x.yaml:\noverride {override!r}: {message}")
    with pytest.raises(ConfigError, match=rf"\A{pattern}"):
        load_text(BASE, override)


def test_switching_the_kind_leaves_keys_of_the_other_kind():
    text = BASE + SGD + "  momentum: 0.5\n  nesterov: true\n"
    rest = "remove it, or override the whole section: 'optimizer={kind: adamw}'"
    assert problems(text, "optimizer.kind=adamw") == [
        f"x.yaml:7: 'optimizer.momentum' belongs to optimizer.kind 'sgd', 'rmsprop' or 'muon', "
        f"not 'adamw'; {rest}",
        f"x.yaml:8: 'optimizer.nesterov' belongs to optimizer.kind 'sgd' or 'muon', not 'adamw'; "
        f"{rest}",
    ]
    assert load_text(text, "optimizer={kind: adamw}").optimizer == AdamConfig()


def test_an_override_into_what_is_not_a_section():
    assert problems(BASE + "mesh: [3]\n", "mesh.stages=3") == [
        "x.yaml:5: mesh: expected a mapping (lines of 'key: value'), got [3]",
        "override 'mesh.stages=3': 'mesh.stages' cannot be set, because 'mesh' is [3] "
        "and not a mapping; make it one",
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file():
    text = BASE + "  bach_size: 3\nmesh:\n  stages: x\n" + SGD + "  eps: 1\ntrain:\n  steps: 0\n"
    with pytest.raises(ConfigError, match=r"^6 problems in x.yaml:\n") as caught:
        load_text(text, "mesh.data=y", "foo")
    places = [re.split(": ", problem)[0] for problem in caught.value.problems]
    assert places == [
        "x.yaml:5",
        "x.yaml:7",
        "x.yaml:10",
        "x.yaml:12",
        "override 'mesh.data=y'",
        "override 'foo'",
    ]
    assert str(caught.value).splitlines()[1:] == list(caught.value.problems)


def test_cross_checks_have_places():
    text = BASE + "  batch_size: 60\nmesh:\n  data: 2\n  simulate: 1\n"
    assert problems(text, "pipeline.micro_batches=8", "pipeline.partition=[1]") == [
        "x.yaml:5: data.batch_size: batch_size 60 is not a multiple of data x micro_batches = "
        "2 x 8 = 16; nearest legal values: 48, 64",
        "x.yaml:8: mesh.simulate: simulate 1 is less than stages x data = 1 x 2 = 2; raise it to 2",
        "override 'pipeline.partition=[1]': pipeline.partition: mesh.stages 1 needs 0 boundaries, "
        "got 1: [1]; give 0, or 'auto'",
    ]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("  bach_size: 60\npipeline: {micro_batches: 60}\n", "data.bach_size"),
        ("pipeline: {partition: [1]}\nmeshes: {stages: 2}\n", "meshes"),
    ],
)
def test_defaults_are_not_checked_where_a_key_is_misspelled(text: str, key: str):
    (problem,) = problems(BASE + text)
    assert f"unknown key '{key}'; did you mean" in problem


class City(Section):
    kind: Literal["city"] = "city"
    name: str = Field(description="what it is called")


class Village(Section):
    kind: Literal["village"] = "village"


class Owner(Section):
    name: str = Field(description="who pays")


class Journey(Configuration):
    """Define a configuration of another kind, like that of the search, with required sections."""

    place: City | Village = Field(discriminator="kind")
    owner: Owner


def test_required_fields_of_another_kind_of_configuration():
    with pytest.raises(ConfigError) as caught:
        loader.load_as(Journey, {"place": {"kind": "city"}, "owner": {}})
    assert caught.value.problems == (
        "place.name: required; give what it is called",
        "owner.name: required; give who pays",
    )


class Few(Section):
    kind: Literal["few"] = "few"
    count: int = Field(default=1, lt=5)
    size: int = Field(default=1, lt=5)


class Many(Section):
    kind: Literal["many"] = "many"
    count: int = Field(default=1, lt=50)
    size: int = Field(default=1, lt=5)


class Crowd(Configuration):
    """Define a configuration whose kinds refuse a value of `count` for different reasons."""

    people: Few | Many = Field(discriminator="kind")


def test_fields_of_an_unknown_kind_are_reported_if_all_kinds_say_the_same():
    with pytest.raises(ConfigError) as caught:
        loader.load_as(Crowd, {"people": {"kind": "manny", "count": 60, "size": 60}})
    kind, *rest = caught.value.problems
    assert kind.startswith("people.kind: expected 'few' or 'many', got 'manny'")
    assert rest == ["people.size: expected less than 5, got 60"]


def test_places_of_what_is_found_later():
    """Locate the fields that errors of the network and the pipeline name."""
    Path("x.yaml").write_text("model:\n  kind: mlp\n  features: [64, 10]\n" + "mesh: {data: 2}\n")
    for section, field, place in [
        ("model", "features", "x.yaml:3"),
        ("model", None, "x.yaml:1"),
        ("model", "unknown", "x.yaml:1"),
        ("mesh", "stages", "override 'mesh.stages=3'"),
        ("mesh", "data", "x.yaml:4"),
        ("train", "steps", "x.yaml:1"),
    ]:
        with (
            pytest.raises(ConfigError) as caught,
            loader.locating("x.yaml", ["mesh.stages=3"]),
        ):
            raise SectionError(section, field, "it does not fit")
        assert caught.value.problems == (f"{place}: {section}: it does not fit",)
    with pytest.raises(ConfigError) as caught, loader.locating({"mesh": {}}, []):
        raise SectionError("mesh", "data", "it does not fit")
    assert caught.value.problems == ("mesh: it does not fit",)


class Trip(Configuration):
    """Define a configuration with a renamed setting, and one whose sections disagree."""

    renamed: ClassVar = {"owner.title": "owner.name"}

    place: City | Village = Field(default=Village(), discriminator="kind")
    owner: Owner


def test_a_renamed_setting_says_its_new_name():
    Path("trip.yaml").write_text("owner:\n  title: Ann\n")
    with pytest.raises(ConfigError) as caught:
        loader.load_as(Trip, "trip.yaml", ["owner.title=Bea", "owner.name=Cid"])
    message = "'owner.title' is now 'owner.name'; rename it"
    assert caught.value.problems == (f"override 'owner.title=Bea': {message}",)
    with pytest.raises(ConfigError) as caught:
        loader.load_as(Trip, "trip.yaml", ["owner.name=Cid"])
    assert caught.value.problems == (f"trip.yaml:2: {message}",)


def test_a_wrong_kind_hides_nothing_else():
    """Neither the other fields of its section, nor other sections, nor rules between these."""
    text = BASE + "  batch_size: 60\nmesh:\n  data: 7\n  simulate: 1\n"
    text += "optimizer:\n  kind: adm\n  learning_rate: -1\n  eps: 0\n  momentum: 2\n  qqq: 1\n"
    lines = problems(text, "train.stepps=3")
    assert [line.split(";")[0] for line in lines] == [
        "x.yaml:5: data.batch_size: batch_size 60 is not a multiple of data x micro_batches = "
        "7 x 1 = 7",
        "x.yaml:8: mesh.simulate: simulate 1 is less than stages x data = 1 x 7 = 7",
        "x.yaml:10: optimizer.kind: expected 'sgd', 'adamw', 'adam', 'rmsprop', 'lion', "
        "'muon' or 'python', got 'adm'",
        "x.yaml:11: optimizer.learning_rate: expected more than 0, got -1",
        "x.yaml:12: optimizer.eps: expected more than 0, got 0",
        "x.yaml:13: optimizer.momentum: expected less than 1, got 2",
        "x.yaml:14: unknown key 'optimizer.qqq'",
        "override 'train.stepps=3': unknown key 'train.stepps'",
    ]


def test_an_invalid_setting_hides_only_the_rules_that_read_it():
    text = BASE + "mesh:\n  stages: 2\n  simulate: 1\npipeline: {partition: [1, 2], chunks: x}\n"
    assert problems(text, "model.classes=3", "data.batch_size=x") == [
        "x.yaml:7: mesh.simulate: simulate 1 is less than stages x data = 2 x 1 = 2; raise it to 2",
        "x.yaml:8: pipeline.chunks: expected a whole number, got 'x'",
        "override 'model.classes=3': model.classes: classes 3 does not fit data 'digits' "
        "(10 classes); make it 10",
        "override 'data.batch_size=x': data.batch_size: expected a whole number, got 'x'",
    ]


SIX_MISTAKES = """\
model: {kind: mpl}
data: {kind: digitz, batch_size: '60'}
mesh: {data: 7, stages: 3, simulate: 1}
pipeline: {schedule: 1f1, partition: [1]}
"""


def test_six_mistakes_come_in_one_run():
    """Rules read the settings beside a wrong kind, and beside a wrong value, as they are."""
    lines = [line.split(",")[0].split(";")[0] for line in problems(SIX_MISTAKES)]
    assert lines == [
        "x.yaml:1: model.kind: expected 'convnet'",
        "x.yaml:2: data.kind: expected 'digits'",
        "x.yaml:2: data.batch_size: batch_size 60 is not a multiple of data x micro_batches = "
        "7 x 1 = 7",
        "x.yaml:3: mesh.simulate: simulate 1 is less than stages x data = 3 x 7 = 21",
        "x.yaml:4: pipeline.schedule: expected 'gpipe'",
        "x.yaml:4: pipeline.partition: mesh.stages 3 needs 2 boundaries",
    ]


def test_a_rule_that_fails_for_valid_sections_is_a_bug_that_shows():
    def broken(place: Any) -> list[tuple[str, str]]:
        return place.nothing_of_this_name

    class Broken(Configuration):
        """Define a configuration with a mistake in its rule."""

        rules = (broken,)
        place: Village = Field(default=Village())

    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        load_as(Broken, {})


def test_a_message_has_fifty_problems_at_most():
    listed = ", ".join("x" for _ in range(60))
    with pytest.raises(ConfigError) as caught:
        load_text(MLP.replace("{kind: mlp}", f"{{kind: mlp, features: [{listed}]}}"))
    head, *shown = str(caught.value).splitlines()
    assert head == "60 problems in x.yaml, the first 50:"
    assert (len(shown), len(caught.value.problems)) == (50, 60)


def test_the_sections_of_the_commands_are_those_of_their_configs():
    names = {command: set(names) for command, names in messages.SECTIONS.items()}
    assert names == {
        "gpipe train": set(Config.model_fields),
        "nas search": set(SearchConfig.model_fields),
    }


def test_a_config_of_another_command_is_one_problem():
    assert problems("space: {kind: nasnet}\nevaluate: {kind: x}\nqqq: 3\n", "train.step=3") == [
        "x.yaml:1: this is a config of `nas search`; give it to that command, or give another file"
    ]
    with pytest.raises(ConfigError, match=r"1 problem .*\n.*a config of `gpipe train`; give it to"):
        load_as(SearchConfig, {"model": {"kind": "mlp"}, "data": {"kind": "digits"}})
    assert "unknown key 'space'" in problems(BASE + "space: {kind: nasnet}\n")[0]


def test_files_that_cannot_be_read():
    Path("pipeline.yaml").write_text(BASE)
    Path("binary.yaml").write_bytes(b"a: \xff")
    Path("large.yaml").write_bytes(b"#" * 1_000_001)
    os.mkfifo("pipe")
    for path, message in [
        ("pipelin.yaml", "no such file; did you mean 'pipeline.yaml'?"),
        ("nowhere/else.yaml", "no such file"),
        (
            ".",
            "is a directory; give the path of a YAML file, such as the config.yaml of a run; in "
            "Python, `trainer.load` reads checkpoints",
        ),
        ("binary.yaml", "not UTF-8 text, at byte 3; save it as UTF-8"),
        ("pipeline.yaml/x", "cannot be read: Not a directory"),
        ("a\0b", "a path cannot hold a zero byte; remove it"),
        ("pipe", "cannot be read: it is a pipe or a device; give the path of a YAML file"),
        ("/dev/zero", "cannot be read: it is a pipe or a device; give the path of a YAML file"),
        (
            "large.yaml",
            "cannot be read: it has more than 1,000,000 bytes, the most that a "
            "configuration may have; give a smaller file",
        ),
        (
            "http://a.b/c.yaml",
            "http:// addresses are not supported; give a path on this machine or a gs:// address",
        ),
        (
            "$UNSET_HERE/c.yaml",
            "the environment variable UNSET_HERE is not set; set it, or write the path out",
        ),
    ]:
        with pytest.raises(ConfigError, match=rf"\A1 problem in .*:\n.*: {re.escape(message)}\Z"):
            load(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1], "expected a path, a dict or a Config, got [1]"),
        (None, "expected a path, a dict or a Config, got nothing"),
        ({"model": 3}, "model: expected a mapping (lines of 'key: value'), got 3"),
        ({1: 3}, "[1]: expected a name as key, got 1; correct it"),
        ({"mesh": {2: 3}}, "mesh[2]: expected a name as key, got 2; correct it"),
        ({"mesh": {"stages": 10**5000}}, "mesh.stages: expected at most 2147483647, got a huge"),
        ({"mesh": {"stages": object()}}, "mesh.stages: expected a whole number, got <object"),
    ],
)
def test_messages_of_values(source: Any, message: str):
    with pytest.raises(ConfigError, match=rf"problems? in the configuration:(\n.*)*\n?{re.escape(message)}"):  # noqa: E501  # fmt: skip
        load(source)


def test_long_values_do_not_fill_the_screen():
    """Neither those that a rule quotes, nor JSON that is nested too deep, nor too many of them."""
    given = {"data": {"kind": "digits"}, "model": {"kind": "amoebanet", "genotype": "x" * 10**5}}
    with pytest.raises(ConfigError, match=r"model.genotype: got 'xxx+\.\.\.") as caught:
        load(given)
    assert len(str(caught.value)) < 5000
    given["model"]["genotype"] = '{"normal": ' + "[" * 10**5
    with pytest.raises(ConfigError, match=r"genotype: not JSON \(maximum recursion"):
        load(given)


def test_a_file_of_too_many_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpipe_jax.config.yaml_parser._MOST_VALUES", 20)
    assert problems(MLP + f"pipeline:\n  cost: {[1] * 20}\n") == [
        "x.yaml:4: more than 20 values, expected a few hundred"
    ]


# ---- nothing else ever leaves -------------------------------------------------------------------

WHOLE = BASE + SGD + "  learning_rate: 3e-4\npipeline:\n  cost: [1, 2]\nmesh:\n  stages: 3\n"
SCRAPS = ["&a ", "*a", "!!x ", "!!python/name:os ", "<<: ", "? ", "- ", "[", "]", "{", "}", ": "]
SCRAPS += ["\t", "'", '"', "\n", "\n\n  ", "---\n", "%YAML 9\n", "\x00", "\ufeff", ">", "#", "@"]
SCRAPS += ["`", ",", "|", "0x", "0b", "é", "null", ".nan", "1e400", "1:30", "kind", "9" * 50]
VALUES = [None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "x", "auto", "3", "\0"]
VALUES += [[], [1], [[1]], ["x", None], {}, {"a": 1}, {"kind": "sgd"}, {1: 2}, {None: []}, "mlp"]


def mutate_text(rng: random.Random) -> str:
    text = WHOLE
    for _ in range(rng.choice([1, 1, 2, 4])):
        if rng.random() < 0.3:  # mild enough to load now and then
            lines = text.splitlines(keepends=True)
            lines[rng.randrange(len(lines))] = rng.choice(["", "# x\n", "\n"])
            text = "".join(lines)
        else:
            start = rng.randrange(len(text) + 1)
            stop = start + rng.choice([0, 0, 1, 5, 20])
            text = text[:start] + rng.choice(SCRAPS) + text[stop:]
    return text


def mutate_tree(rng: random.Random) -> str:
    tree = yaml.safe_load(WHOLE)
    names = [*Config.model_fields, "zzz", 7]
    for _ in range(rng.choice([1, 1, 2, 4])):
        section = rng.choice(names)
        if isinstance(tree.get(section), dict) and rng.random() < 0.9:
            fields = [*tree[section], "kind", "eps", "stages", "cost", "widths", "zzz", 7]
            field = rng.choice(fields)
            tree[section].pop(field, None)
            if rng.random() < 0.7:
                tree[section][field] = rng.choice(VALUES)
        else:
            tree[section] = rng.choice(VALUES)
    return yaml.safe_dump(tree)


def random_overrides(rng: random.Random) -> list[str]:
    names = [
        "mesh.stages",
        "model.kind",
        "optimizer.kind",
        "pipeline.cost",
        "model",
        "a.b",
        "",
        ".",
    ]
    values = [*SCRAPS, "3", "adamw", "mlp", "[1, 2]", "{kind: sgd}", ""]
    signs = ["=", "=", "=", "", "=="]
    picks = range(rng.choice([0, 0, 0, 1, 2]))
    return [rng.choice(names) + rng.choice(signs) + rng.choice(values) for _ in picks]


@pytest.mark.parametrize("mutate", [mutate_text, mutate_tree])
def test_only_config_errors_with_places_leave(mutate: Any):
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        text, overrides = mutate(rng), random_overrides(rng)
        try:
            config = load_text(text, *overrides)
        except ConfigError as error:
            outcomes["refused"] += 1
            assert error.problems
            for problem in str(error).splitlines()[1:]:
                assert re.match(r"(x\.yaml:\d+|override (['\"]).*\2): \S", problem), (text, problem)
        else:
            outcomes["loaded"] += 1
            assert load_text(loader.dump(config)) == config
    assert min(outcomes.values()) > 5, outcomes  # a fuzz test that only ever fails tests one path
