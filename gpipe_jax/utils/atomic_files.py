"""Write files whole or not at all, even if the process is killed meanwhile."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from etils import epath

DRAFT_SUFFIX = r"(\.[0-9a-f]+)?\.tmp"
"""Pattern of what a draft's name adds to the name of its file, also in earlier versions."""

AnyPath = TypeVar("AnyPath", "epath.Path", Path)


@contextlib.contextmanager
def replacing(path: AnyPath, *, durable: bool = False) -> Iterator[AnyPath]:
    """Yield the path of a draft; when the block ends without an error, it becomes the file `path`.

    The draft is a new file with a unique name: no other file is touched, and several processes may
    write the same file. An error removes the draft. A killed process leaves it; see
    `remove_drafts`. On remote storage (gs://) the draft is `path` itself: objects there appear
    only when they are complete.

    Args:
        path: The file to write or to replace. Its folder must exist. A link is replaced, not
            followed.
        durable: Flush the file and its new name to the disk, so that a power cut keeps them.
    """
    if not is_local(path):
        yield path
        return
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
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


def write_text(path: AnyPath, text: str, *, durable: bool = False) -> None:
    """Write a text file at once, as UTF-8; see `replacing`."""
    with replacing(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def remove_drafts(path: "epath.Path | Path") -> None:
    """Remove the drafts of a file that killed processes left, while no process writes it."""
    if not is_local(path):
        return
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.tmp")
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            path.with_name(name).unlink(missing_ok=True)


def is_local(path: "epath.Path | Path") -> bool:
    """Return whether a path is on this machine, not a gs:// address."""
    return "://" not in str(path)


def sync_folder(path: "epath.Path | Path") -> None:
    """Flush the names in a folder to the disk, if it is a local folder."""
    if is_local(path):
        _sync(path)


def _sync(path: "epath.Path | Path") -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
