"""Check the printed architecture: the order of rooms, contracts, imports that point up."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from paths import SCRIPTS


@pytest.fixture
def architecture() -> ModuleType:
    """Import the script as a module of its own."""
    spec = importlib.util.spec_from_file_location("architecture", SCRIPTS / "architecture.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = module
    spec.loader.exec_module(module)
    return module


def plant(root: Path, files: dict[str, str]) -> None:
    """Write a small package."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_no_import_points_up(architecture: ModuleType) -> None:
    assert [str(found) for found in architecture.upward_imports()] == []


def test_every_room_has_a_layer_and_a_contract(architecture: ModuleType) -> None:
    assert architecture.unlisted() == []
    for room in architecture.rooms():
        text = architecture.contract(room.path)
        assert text.endswith(".") and len(text.split()) > 2, f"{room.path}: {text!r}"
        assert room.files


def test_faults_are_found(
    architecture: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    monkeypatch.setattr(architecture, "LAYERS", {"house": (("low", "side"), ("high",), ("cli",))})
    plant(
        tmp_path,
        {
            "house/__init__.py": '"""Be a house."""',
            "house/low/__init__.py": '"""Hold what is low."""',
            "house/low/a.py": "from house.low import b\nimport json\ndef f(): import house.high\n",
            "house/low/b.py": "if TYPE_CHECKING:\n    import house.high\nfrom house import side\n",
            "house/side.py": '"""Stand beside."""',
            "house/high/__init__.py": '"""Stand above."""\nfrom house.low import a\n',
            "house/high/c.py": "from house import search\n",
            "house/cli.py": '"""Run."""\nimport house\n',
            "house/new/__init__.py": "",
        },
    )
    assert [str(found) for found in architecture.upward_imports()] == [
        "house/low/a.py imports house.high",
        "house/low/b.py imports house.side",
        "house/high/c.py imports house.search",
    ]
    assert architecture.unlisted() == ["house/new"]
    printed = "\n".join(architecture.lines())
    assert "house: 4 folders or files in 3 layers, 7 modules" in printed
    assert "  1  low              3  Hold what is low." in printed


def test_it_prints_and_its_exit_code_says_whether_all_is_well() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "architecture.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("Imports that point up:\n  none\n")
    assert re.search(r"^ +\d+  pipeline  ", done.stdout, re.MULTILINE)
