"""Name the folder of a run, copy it, and notice when it is no longer there."""

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from gpipe_jax.utils import paths
from nas.errors import LostRunError

FileId = tuple[int, int]  # device and number of the file on it


def run_folder(folder: str | Path, name: str) -> Path:
    """Return FOLDER/NAME.

    Raises:
        ValueError: The name is not that of one folder, so that the run could be elsewhere.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder {folder!r}: expected the path of the folder of runs")
    if not is_name(name):
        raise ValueError(
            f"name {name!r} must be the name of one folder, such as 'first', because the run is "
            f"stored in {folder}/NAME; give what is above it as `folder`"
        )
    return paths.local("folder", folder) / name


def is_name(name: object) -> bool:
    """Return whether this is the name of one folder, and no path."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return Path(name).name == name


def file_id(path: Path) -> FileId | None:
    """Return what tells this file from others at the same path; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def copy_other_files(path: Path, folder: Path) -> None:
    """Copy all files beside the store at `path`; those that vanish meanwhile are left out."""
    own = (path.name, path.with_suffix(".lock").name)  # and SQLite's files that begin with these
    for each in path.parent.iterdir():
        if each.name.startswith(own):
            continue
        if each.is_dir():
            shutil.copytree(each, folder / each.name, copy_function=_copy_if_there)
        else:
            _copy_if_there(each, folder / each.name)


def _copy_if_there(file: str | Path, copy: str | Path) -> None:
    with suppress(FileNotFoundError):  # weights that are no longer needed
        shutil.copy2(file, copy)


def lost_run(path: Path, connection: sqlite3.Connection) -> LostRunError:
    """Save a copy of a store whose file is gone, as long as it is open; return the error."""
    was = "was removed or moved" if file_id(path) is None else "was replaced by another"
    problem = f"the run's folder {path.parent} {was} while the search was running"
    try:
        folder = Path(tempfile.mkdtemp(prefix="nas-")) / path.parent.name
        folder.mkdir()
        with closing(sqlite3.connect(folder / path.name)) as copy:
            connection.backup(copy)
    except (OSError, sqlite3.Error) as error:
        return LostRunError(f"{problem}, and its results cannot be saved elsewhere ({error})")
    return LostRunError(
        f"{problem}; its results until then are in {folder}: move that to where you want the run, "
        "and resume it there",
        str(folder),
    )
