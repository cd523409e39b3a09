"""Run `gpipe init`: write a first config, data file and network, to run and to change."""

import argparse
import shlex
from importlib import resources
from pathlib import Path

from gpipe_jax.errors import OptionError
from gpipe_jax.utils import console
from gpipe_jax.utils.messages import answer, write

FILES = ["config.yaml", "my_data.py", "my_model.py"]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "write a commented config, a data file and a network to start from"
    command = console.add_command(commands, "init", run, text)
    command.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=console.path,
        default=Path(),
        help="default: this one",
    )


def run(options: argparse.Namespace) -> int:
    """Write the files; if one of them exists, write none."""
    folder: Path = options.folder
    paths = [folder / name for name in FILES]
    existing = [path for path in paths if path.exists()]
    if existing:
        problem = f"{existing[0]} exists already; choose another folder, or remove it"
        raise OptionError("FOLDER", problem)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _write_new(path)
    except OSError as error:
        raise OptionError(
            "FOLDER", f"cannot write into {folder}: {error.strerror or error}"
        ) from error
    for path in paths:
        write(f"wrote {path}")
    change_folder = "" if folder == Path() else f"cd {shlex.quote(str(folder))}; "
    write(f"start with: {change_folder}gpipe train config.yaml")
    write(f"a network of your own: {change_folder}python my_model.py")
    answer({"files": [str(path) for path in paths]})
    return 0


def _write_new(path: Path) -> None:
    """Copy one of the files of this package; fail if another process has made it meanwhile."""
    text = resources.files("gpipe_jax.cli").joinpath("starter", path.name).read_text("utf-8")
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
