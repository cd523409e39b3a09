"""Imports of the search point one way; only training loads JAX; `import nas` is quick."""

import graphlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from import_graph import imports_of

import nas

ROOT = Path(nas.__file__).parent
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in ROOT.rglob("*.py")
    if path.stem != "__init__"
}
LIGHT = [name for name in MODULES if not name.startswith("training.")]


def module_of(imported: str) -> str | None:
    """The module of this package that an imported name is, or is in."""
    name = imported.removeprefix("nas.")
    while name and name != imported:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


GRAPH = {
    name: {found for found in map(module_of, imports_of(path)) if found not in (None, name)}
    for name, path in MODULES.items()
}
READING_ORDER = ["space", "evolution", "records", "store", "searching", "driver", "result", "cli"]


def reachable(name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        new = GRAPH[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_the_packages_first_lines_name_every_module() -> None:
    words = set(re.findall(r"\w+", nas.__doc__ or ""))
    assert set(LIGHT) <= words


def test_imports_have_no_cycle() -> None:
    """Not even through imports within functions."""
    assert "searching" in GRAPH["driver"]
    assert set(graphlib.TopologicalSorter(GRAPH).static_order()) == set(MODULES)


@pytest.mark.parametrize("later", range(1, len(READING_ORDER)))
def test_no_module_imports_one_that_is_read_after_it(later: int) -> None:
    for earlier in READING_ORDER[:later]:
        assert READING_ORDER[later] not in reachable(earlier)


@pytest.mark.parametrize("name", [*LIGHT, "training.evaluator", "training.names"])
def test_no_module_imports_jax(name: str) -> None:
    packages = {imported.split(".")[0] for imported in imports_of(MODULES[name])}
    assert not packages & {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_importing_is_quick_and_no_name_loads_jax() -> None:
    code = """
import nas, sys
assert not {"jax", "numpy", "pandas", "sqlite3"} & set(sys.modules)
for name in nas.__all__:
    assert getattr(nas, name) is not None
print("jax" in sys.modules, dir(nas) == sorted(nas.__all__))
"""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.stdout == "False True\n", done.stderr
    assert min(times) < 1.5


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'nas' has no attribute 'serach'"):
        nas.serach  # noqa: B018
