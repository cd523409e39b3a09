"""Write files whole or not at all, even if the process is killed meanwhile."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

DRAFT_SUFFIX = r"(\.\d+)?\.tmp"
"""Pattern of what a draft's name adds to the name of its file; see `replacing`."""

AnyPath = TypeVar("AnyPath", epath.Path, Path)


@contextlib.contextmanager
def replacing(path: AnyPath, *, durable: bool = False, shared: bool = False) -> Iterator[AnyPath]:
    """Yield the path of a draft; when the block ends without an error, it becomes the file `path`.

    An error removes the draft. A killed process leaves it, and the next one that writes the file
    replaces it. On remote storage (gs://) the draft is `path` itself: objects there
    appear only when they are complete.

    Args:
        path: The file to write or to replace. Its folder must exist.
        durable: Flush the file and its new name to the disk, so that a power cut keeps them.
        shared: Give each draft a name of its own, because several threads or processes may write
            this file at the same time.
    """
    if not is_local(path):
        yield path
        return
    # On one machine the ids of threads are unique, also between processes.
    writer = f".{threading.get_native_id()}" if shared else ""
    draft = path.with_name(f"{path.name}{writer}.tmp")
    try:
        yield draft
        if durable:
            _sync(draft)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: AnyPath, text: str, *, durable: bool = False, shared: bool = False) -> None:
    """Write a text file at once, as UTF-8; see `replacing`."""
    with replacing(path, durable=durable, shared=shared) as draft:
        draft.write_text(text, encoding="utf-8")


def is_local(path: epath.Path | Path) -> bool:
    """Return whether a path is on this machine, not a gs:// address."""
    return "://" not in str(path)


def sync_folder(path: epath.Path | Path) -> None:
    """Flush the names in a folder to the disk, if it is a local folder."""
    if is_local(path):
        _sync(path)


def _sync(path: epath.Path | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
