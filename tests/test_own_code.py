"""Check what is found and called by name, and the messages for what cannot be."""

from pathlib import Path

import pytest

import gpipe_jax as gpipe
from gpipe_jax import own_code
from gpipe_jax.errors import ArgumentError, ConfigError, SectionError
from gpipe_jax.training import from_config

CODE = """
import json
def double(x, *, times=2): return x * times
def fails(): return 1 / 0
def wrong(): return 3
def no_rate(b): return b
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import no_such_package")
    return tmp_path


@pytest.mark.parametrize("name", ["mine.py:double", "mine:double"])
def test_a_file_beside_the_config_is_called(folder: Path, name: str) -> None:
    assert own_code.call(name, {"x": 3, "times": 5}, folder) == 15
    assert own_code.find(name, folder) is own_code.find(name, folder)  # run once


def test_installed_code_is_called() -> None:
    assert own_code.call("json:dumps", {"obj": [1]}) == "[1]"


@pytest.mark.parametrize(
    ("name", "arguments", "setting", "message"),
    [
        ("missing.py:f", {}, "function", r"missing.py:f is not a function of a Python file in /"),
        ("missing:f", {}, "function", r"no file missing.py in .*, and no module 'missing' is inst"),
        ("mine:doubel", {}, "function", r"does not define 'doubel'; did you mean 'double'\?"),
        ("mine:number", {}, "function", r"mine:number is a int; name a function or a class"),
        ("mine:fails", {}, "function", r"mine:fails raised ZeroDivisionError: division by zero"),
        ("broken:f", {}, "function", r"raised ModuleNotFoundError: No module named 'no_such"),
        ("mine:double", {"x": 1, "tims": 2}, "arguments", r"'tims'.*did you mean 'times'\?"),
        ("mine:double", {}, "arguments", r"do not fit mine:double\(x, \*, times=2\): missing"),
        ("mine:wrong", {"x": 1}, "arguments", r"has 'x', which mine:wrong does not take; it takes"),
    ],
)
def test_what_cannot_be_called(folder: Path, name, arguments, setting, message) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        own_code.call(name, arguments, folder)
    assert caught.value.argument == setting


@pytest.mark.parametrize(
    ("overrides", "section", "message"),
    [
        (["model={kind: python, function: 'mine:wrong'}"], "model", "returned a int; it must ret"),
        (["loss={kind: python, function: 'mine:dubble'}"], "loss", "did you mean 'double'"),
        (["optimizer={kind: python, function: 'mine:wrong'}"], "optimizer", "not take 'learning_"),
        (["train.metrics=['mine:nothing']"], "train", "does not define 'nothing'"),
        (
            ["train.metrics=['mine:wrong']"],
            "train",
            r"wrong\(\) is called with \(outputs, la",
        ),
        (
            ["train.callbacks=['mine:wrong']"],
            "train",
            r"wrong\(\) is called with \(a record\);",
        ),
        (["loss={kind: python, function: 'mine:wrong'}"], "loss", r"with \(outputs, labels\); def"),
    ],
)
def test_wrong_code_of_a_config_is_located(folder: Path, overrides, section, message) -> None:
    path = folder / "x.yaml"
    path.write_text("model: {kind: mlp, features: [64, 10]}\ndata: {kind: digits}\n")
    config = gpipe.load(path, overrides)
    assert config.train.code == str(folder)
    with pytest.raises(SectionError, match=message) as caught:
        from_config.assemble(config, folder / "run")
    assert caught.value.section == section


def test_a_name_without_a_module_is_refused() -> None:
    sections = {"model": {"kind": "python", "function": "layers"}, "data": {"kind": "digits"}}
    with pytest.raises(ConfigError, match=r"model.function: got layers, but .* module:function"):
        gpipe.load(sections)


def test_numbers_in_arguments_are_numbers() -> None:
    model = {"kind": "python", "function": "m:f", "arguments": {"rate": "3e-4", "name": "e4"}}
    config = gpipe.load({"model": model, "data": {"kind": "digits"}})
    assert config.model_dump()["model"]["arguments"] == {"rate": 3e-4, "name": "e4"}
