"""Imports point one way, the light modules stay light, and `import gpipe_jax` is quick."""

import doctest
import graphlib
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from import_graph import imports_of

import gpipe_jax

ROOT = Path(gpipe_jax.__file__).parent
NAMES = {
    ".".join(["gpipe_jax", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}
# The order in which the package is read, and its data flows (docstring of gpipe_jax/__init__.py).
READING_ORDER = [
    "zoo",
    "cost",
    "partition",
    "schedule",
    "slots",
    "wire",
    "packing",
    "storage",
    "stages",
    "spmd",
    "state",
    "layered",
    "composite",
    "cutting",
    "memory",
    "device",
    "executor",
    "pipeline",
    "trainer",
    "planning",
]
NO_JAX = ["config", "messages", "yaml_source", "loader", "partition", "schedule", "slots"]
NO_JAX += ["hints", "terminal", "units"]


def module_of(name: str) -> str | None:
    """The module of this package that an imported name is, or is in."""
    while name:
        if name in NAMES:
            return name
        name = name.rpartition(".")[0]
    return None


GRAPH = {
    name: {m for m in map(module_of, imports_of(path)) if m not in (None, "gpipe_jax", name)}
    for name, path in NAMES.items()
}


def reachable(name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        new = GRAPH[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_the_graph_is_that_of_the_package() -> None:
    assert "gpipe_jax.losses" in GRAPH["gpipe_jax.pipeline.device_step"]
    assert "gpipe_jax.layers.layer" in reachable("gpipe_jax.training.trainer")
    assert "gpipe_jax.pipeline.pipeline" not in reachable(
        "gpipe_jax.pipeline.summary"
    )  # TYPE_CHECKING only


def test_imports_have_no_cycle() -> None:
    """Not even through imports within functions."""
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert set(order) == set(NAMES)


@pytest.mark.parametrize("later", range(1, len(READING_ORDER)))
def test_no_module_imports_one_that_is_read_after_it(later: int) -> None:
    for earlier in READING_ORDER[:later]:
        assert f"gpipe_jax.{READING_ORDER[later]}" not in reachable(f"gpipe_jax.{earlier}")


@pytest.mark.parametrize("name", NO_JAX)
def test_light_modules_import_no_jax(name: str) -> None:
    for module in {f"gpipe_jax.{name}", *reachable(f"gpipe_jax.{name}")}:
        packages = {imported.split(".")[0] for imported in imports_of(NAMES[module])}
        assert not packages & {"jax", "jaxlib", "flax", "optax", "orbax"}, module


@pytest.mark.parametrize("name", NAMES)
def test_the_library_knows_nothing_of_the_search(name: str) -> None:
    assert "nas" not in {imported.split(".")[0] for imported in imports_of(NAMES[name])}


def in_a_fresh_process(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_is_quick_and_starts_no_backend() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        in_a_fresh_process("import gpipe_jax, sys; assert 'jax' not in sys.modules")
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5


def test_every_public_name_resolves_without_starting_a_backend() -> None:
    code = """
import gpipe_jax
for name in gpipe_jax.__all__:
    assert getattr(gpipe_jax, name) is not None
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), dir(gpipe_jax) == sorted(gpipe_jax.__all__))
"""
    assert in_a_fresh_process(code) == "False True\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gpipe_jax' has no attribute 'pipelines'"):
        gpipe_jax.pipelines  # noqa: B018


def test_examples_in_docstrings() -> None:
    names = [name for name, path in NAMES.items() if ">>>" in path.read_text(encoding="utf-8")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert results and all(r.attempted and not r.failed for r in results)
