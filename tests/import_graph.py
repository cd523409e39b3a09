"""Read the modules of the packages, and which of them a module imports."""

import importlib.util
from pathlib import Path
from types import ModuleType

from paths import REPOSITORY, SCRIPTS


def load_script(name: str) -> ModuleType:
    """Import a file of `scripts`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture = load_script("architecture")
PACKAGES = tuple(architecture.LAYERS)


def module_name(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def module_of(name: str) -> str | None:
    """Return the module that a dotted name is, or is in; None for other packages."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


IMPORTS = {name: architecture.imports_of(path) for name, path in MODULES.items()}
# The packages themselves are left out: their public names have homes in any room.
GRAPH = {
    name: {m for m in map(module_of, imports) if m and m != name and m not in PACKAGES}
    for name, imports in IMPORTS.items()
}


def reachable(name: str) -> set[str]:
    """Return all modules that importing this one may import, also within functions."""
    modules: set[str] = set()
    pending = [name]
    while pending:
        new = GRAPH[pending.pop()] - modules
        modules |= new
        pending += new
    return modules
