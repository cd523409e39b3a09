"""Find what the house style forbids. `python tests/house_style.py [FOLDER ...]` prints it."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from paths import REPOSITORY

# A docstring begins with a verb: "Return whether ...", not "Whether ...".
FORBIDDEN_OPENERS = re.compile(
    r"(A|All|An|As|Between|By|Every|From|How|Its?|Of|One|That|The|This"
    r"|What|Where|Whether|Which|With)\b"
)


def sources(*folders: str) -> list[Path]:
    """Return the Python files of folders of the repository."""
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def bad_openers(path: Path) -> list[str]:
    """Return the docstrings that begin with no verb, each as "file:line: first line"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    problems: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        text = isinstance(node, documented) and ast.get_docstring(node)
        if text and FORBIDDEN_OPENERS.match(text):
            problems.append((getattr(node, "lineno", 1), text.splitlines()[0]))
    return [f"{path.relative_to(REPOSITORY)}:{line}: {text}" for line, text in sorted(problems)]


def lines_with(pattern: str, paths: Iterable[Path]) -> list[str]:
    """Return the lines that contain a regular expression, each as "file:line: text"."""
    return [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def named_lambdas(paths: Iterable[Path]) -> list[str]:
    """Return the suppressions of ruff's rule against lambdas with a name."""
    return lines_with(r"noqa:.*\bE731\b", paths)


def definitions_of_pytree(paths: Iterable[Path]) -> list[str]:
    """Return the definitions of the type `PyTree`."""
    return lines_with(r"^\s*PyTree\b.*=\s*Any\b", paths)


def main(folders: list[str]) -> None:
    """Print every problem and the counts."""
    paths = sources(*(folders or ["gpipe_jax", "nas"]))
    openers = [problem for path in paths for problem in bad_openers(path)]
    lambdas, pytrees = named_lambdas(paths), definitions_of_pytree(paths)
    print(*openers, *lambdas, *pytrees, sep="\n")
    print(
        f"{len(openers)} docstrings without a verb, {len(lambdas)} lambdas with a name, "
        f"{len(pytrees)} definitions of PyTree"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
