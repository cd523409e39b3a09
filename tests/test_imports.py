"""Check that imports point down, light modules load no JAX, and packages import quickly."""

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from import_graph import GRAPH, IMPORTS, MODULES, PACKAGES, architecture, reachable
from paths import REPOSITORY

JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Rooms and modules that run without JAX: reading a config or drawing a schedule loads none.
NO_JAX = {
    "gpipe_jax": (
        *("utils.text", "utils.console", "utils.messages", "utils.atomic_files", "utils.checks"),
        *("utils.paths", "progress"),
        *("errors", "schedules"),
        *("genotypes", "config", "data", "partition.solver"),
    ),
    # All but training, costs and `workers="devices"`.
    "nas": (
        *("spaces", "errors", "evaluators", "testing", "evolution", "storage", "config"),
        *("ask_tell", "reports", "result", "export", "from_config", "cli"),
        *("workers.dask", "workers.driver", "workers.pools", "workers.threads"),
        "training.evaluator",
        "choices",
    ),
}
LARGEST_FOLDER = 11  # modules beside `__init__`
COMMANDS = ("__main__", "train")  # of `python -m`; nothing imports them
RE_EXPORTING = ("config", "data", "genotypes", "losses", "schedules", "zoo")
FOLDERS = [
    path.parent.relative_to(REPOSITORY).as_posix()
    for path in MODULES.values()
    if path.name == "__init__.py"
]


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_graph_is_that_of_the_packages() -> None:
    assert "gpipe_jax.losses.weighting" in GRAPH["gpipe_jax.pipeline.device_step"]
    assert "gpipe_jax.layers.layer" in reachable("gpipe_jax.training.trainer")
    assert "nas.ask_tell.search" in GRAPH["nas.workers.driver"]
    # The summary imports the pipeline under TYPE_CHECKING only.
    assert "gpipe_jax.pipeline.pipeline" not in reachable("gpipe_jax.pipeline.summary")


# --- direction (between rooms: test_architecture) ------------------------------------------------


def test_files_do_not_import_each_other_in_circles() -> None:
    """Count imports within functions too."""
    assert set(graphlib.TopologicalSorter(GRAPH).static_order()) == set(MODULES)


@pytest.mark.parametrize(
    "room", [f"{package}.{room}" for package, rooms in NO_JAX.items() for room in rooms]
)
def test_light_rooms_import_no_jax(room: str) -> None:
    """Follow the imports of gpipe_jax; functions of nas may import what needs JAX."""
    members = {name for name in MODULES if is_in(name, room)}
    assert members
    if is_in(room, "gpipe_jax"):
        members |= {module for member in members for module in reachable(member)}
    for member in members:
        assert not JAX & {imported.split(".")[0] for imported in IMPORTS[member]}, member


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_the_docstring_of_the_package_draws_its_layers(package: str) -> None:
    """Compare the lines from the top; neighbours may share a line."""
    text = ast.get_docstring(tree_of(REPOSITORY / package / "__init__.py")) or ""
    # Indented lines: names, two spaces or more, and what they are for.
    lines = re.findall(r"^    (\w[\w, ]*?)  ", text, re.MULTILINE)
    line_of = {room: number for number, line in enumerate(lines) for room in line.split(", ")}
    rooms = [room for room in architecture.rooms() if room.package == package]
    drawn = [line_of[room.name] for room in reversed(rooms) if room.name not in COMMANDS]
    assert drawn == sorted(drawn)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_small_and_not_deep(folder: str) -> None:
    path = REPOSITORY / folder
    assert len([*path.glob("*.py")]) <= LARGEST_FOLDER + 1
    assert len(path.relative_to(REPOSITORY).parts) <= 3  # the package, a room, a folder in it


def test_each_folder_of_tests_is_that_of_a_folder() -> None:
    tests = REPOSITORY / "tests"
    for folder in {path.parent.relative_to(tests) for path in tests.glob("*/**/test_*.py")}:
        package = folder if folder.parts[0] == "nas" else "gpipe_jax" / folder
        assert package.as_posix() in FOLDERS, folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_states_its_contract_and_nothing_else(folder: str) -> None:
    path = REPOSITORY / folder
    text = architecture.contract(path)
    assert text.endswith(".") and len(text.split()) > 2
    if path.name not in (*PACKAGES, *RE_EXPORTING):
        assert (REPOSITORY / folder / "__init__.py").read_text(
            encoding="utf-8"
        ) == f'"""{text}"""\n'


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_name_occurs_twice(package: str) -> None:
    names = Counter(
        node.name
        for module, path in MODULES.items()
        if is_in(module, package)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


# --- public names ---------------------------------------------------------------------------------


def in_a_fresh_process(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


NOT_LOADED = {"gpipe_jax": {"jax", "numpy"}, "nas": {"jax", "numpy", "pandas", "sqlite3"}}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_is_quick_and_loads_no_library(package: str) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        in_a_fresh_process(
            f"import {package}, sys; assert not {NOT_LOADED[package]} & set(sys.modules)"
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5


def test_public_names_of_gpipe_jax_start_no_backend() -> None:
    code = """
import gpipe_jax
for name in gpipe_jax.__all__:
    assert getattr(gpipe_jax, name) is not None
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), dir(gpipe_jax) == sorted(gpipe_jax.__all__))
"""
    assert in_a_fresh_process(code) == "False True\n"


def test_the_pipeline_loads_no_library_of_command_lines() -> None:
    code = "import gpipe_jax, sys; gpipe_jax.Pipeline; print('shtab' in sys.modules)"
    assert in_a_fresh_process(code) == "False\n"


def test_public_names_of_nas_load_no_jax() -> None:
    code = """
import nas, sys
for name in nas.__all__:
    assert getattr(nas, name) is not None
print("jax" in sys.modules, dir(nas) == sorted(nas.__all__))
"""
    assert in_a_fresh_process(code) == "False True\n"


@pytest.mark.parametrize("name", [n for n, p in MODULES.items() if "__all__" in p.read_text()])
def test_the_list_of_public_names_is_sorted_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    # As ruff sorts them: constants, classes, functions and modules.
    order = sorted({*module.__all__}, key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert list(module.__all__) == order
    assert all(hasattr(module, public) for public in module.__all__)
    if MODULES[name].name == "__init__.py":
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree_of(MODULES[name]))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        defined = {name for name in vars(module) if name.isupper() and name[0] != "_"}
        assert set(module.__all__) == (imported | defined) - {"TYPE_CHECKING"}
    if name in PACKAGES:
        assert set(module.__all__) == set(module._HOME)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    message = f"module '{package}' has no attribute 'pipelines'"
    with pytest.raises(AttributeError, match=message):
        getattr(importlib.import_module(package), "pipelines")  # noqa: B009


@pytest.mark.parametrize("name", ["optimizer", "schedule"])
def test_an_old_public_name_is_an_error_with_the_new_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; it is named '{name}s' since"):
        getattr(importlib.import_module("gpipe_jax"), name)


def test_an_old_public_name_of_nas_is_an_error_with_the_new_names() -> None:
    with pytest.raises(AttributeError, match="'nasbench201'; see NASBench201Space and NASBench20"):
        getattr(importlib.import_module("nas"), "nasbench201")  # noqa: B009


@pytest.mark.parametrize("package", PACKAGES)
def test_every_error_is_public(package: str) -> None:
    module = importlib.import_module(f"{package}.errors")
    tree = tree_of(MODULES[f"{package}.errors"])
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert module.__all__ == sorted(classes)


WITH_EXAMPLES = [name for name, path in MODULES.items() if ">>>" in path.read_text()]


def test_examples_in_docstrings() -> None:
    results = [doctest.testmod(importlib.import_module(name)) for name in WITH_EXAMPLES]
    assert results and all(r.attempted and not r.failed for r in results)
