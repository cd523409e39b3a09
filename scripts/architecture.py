"""Print the tree of rooms (folders), their contracts, and the imports that would point up.

    python scripts/architecture.py

`LAYERS` is the one place where the order of the rooms is written down. A room is a folder of a
package, or a module beside these folders. It may import from rooms of the layers below its own.
"""

import argparse
import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 84  # columns of a printed line: what a page of the documentation shows

# The rooms of each package, from the bottom layer to the top one. A later package may import from
# all of an earlier one.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gpipe_jax": (
        ("errors",),
        ("utils",),
        ("schedules", "losses", "progress", "known_code", "own_code"),
        ("distributed", "genotypes", "data", "plots"),
        ("layers", "config", "tpu_compiler"),
        ("partition", "zoo", "sequential"),
        ("pipeline",),
        ("checkpoint",),
        ("run_folder",),
        ("training",),
        ("planner",),
        ("cli",),
        ("__main__", "train"),
    ),
    "nas": (
        ("keywords", "errors", "choices", "fingerprints"),
        ("spaces",),
        ("evaluators", "testing"),
        ("evolution",),
        ("storage", "config"),
        ("ask_tell",),
        ("pickles",),
        ("workers",),
        ("reports", "training"),
        ("costs", "result"),
        ("export", "from_config"),
        ("cli",),
    ),
}


@dataclass(frozen=True)
class Room:
    """Hold the place of a room: its package, name and layer."""

    package: str
    name: str
    layer: int  # from 1, the bottom layer of the package

    @property
    def path(self) -> Path:
        """Return the folder or the file."""
        folder = ROOT / self.package / self.name
        return folder if folder.is_dir() else folder.with_suffix(".py")

    @property
    def files(self) -> list[Path]:
        """Return all its modules, those of its inner packages included."""
        if self.path.is_file():
            return [self.path]
        return sorted(p for p in self.path.rglob("*.py") if (p.parent / "__init__.py").exists())


@dataclass(frozen=True)
class UpwardImport:
    """Hold an import of a room that is not below the importing one."""

    file: Path
    module: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} imports {self.module}"


def rooms() -> list[Room]:
    """Return the rooms of all packages in the order of `LAYERS`."""
    return [
        Room(package, name, number)
        for package, layers in LAYERS.items()
        for number, names in enumerate(layers, start=1)
        for name in names
    ]


def unlisted() -> list[str]:
    """Return the folders and modules that `LAYERS` does not have."""
    listed = {room.path for room in rooms()}
    return [
        str(path.relative_to(ROOT))
        for package in LAYERS
        for path in sorted((ROOT / package).iterdir())
        if (path.suffix == ".py" or any(path.glob("*.py"))) and path not in listed
        if path.name != "__init__.py"
    ]


def contract(path: Path) -> str:
    """Return the first line of the docstring of a folder or a module; empty without one."""
    file = path / "__init__.py" if path.is_dir() else path
    if not file.exists():
        return ""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def imports_of(file: Path) -> set[str]:
    """Return the dotted names that a file imports, except under `if TYPE_CHECKING`."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from package import name` may import a module of the package.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return names


def upward_imports() -> list[UpwardImport]:
    """Return every import of a room that is not below the importing room."""
    layer_of = {(room.package, room.name): room.layer for room in rooms()}
    return [
        UpwardImport(file, module)
        for room in rooms()
        for file in room.files
        for module in sorted(imports_of(file))
        if not _is_allowed(room, module, layer_of)
    ]


def _is_allowed(room: Room, module: str, layer_of: dict[tuple[str, str], int]) -> bool:
    package, *names = module.split(".")
    if package not in LAYERS:
        return True
    if package != room.package:
        packages = list(LAYERS)
        return packages.index(package) < packages.index(room.package)
    name = names[0] if names else ""
    if (package, name) not in layer_of:
        return room.name == "cli"  # a public name of the package: its home may be in any layer
    return name == room.name or layer_of[package, name] < room.layer


def lines() -> Iterator[str]:
    """Yield the printed lines."""
    for package, layers in LAYERS.items():
        members = [room for room in rooms() if room.package == package]
        modules = sum(len(room.files) for room in members)
        listed = f"{len(members)} folders or files in {len(layers)} layers"
        yield f"{package}: {listed}, {modules} modules"
        for room in reversed(members):
            yield _line(str(room.layer), room.name, room.files, contract(room.path))
            for folder in sorted({file.parent for file in room.files} - {room.path}):
                if room.path.is_dir():
                    files = [file for file in room.files if folder in file.parents]
                    yield _line("", f"  {folder.name}", files, contract(folder))
        yield ""
    yield "Imports that point up:"
    yield from [f"  {found}" for found in upward_imports()] or ["  none"]
    if missing := unlisted():
        yield f"Not in any layer: {', '.join(missing)}"


def _line(layer: str, name: str, files: list[Path], text: str) -> str:
    first = f"{layer:>3}  {name:<14} {len(files):>3}  "
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))


def main() -> int:
    """Print everything; return 1 if an import points up or a room has no layer."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print("\n".join(lines()))
    return 1 if upward_imports() or unlisted() else 0


if __name__ == "__main__":
    raise SystemExit(main())
