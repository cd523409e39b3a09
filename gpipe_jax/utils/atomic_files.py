"""Write files whole or not at all."""

import os

from etils import epath


def replace(path: epath.Path, text: str) -> None:
    """Write a file at once: a cut must not leave half of it."""
    if not is_local(path):
        path.write_text(text)
        return
    new = path.with_name(path.name + ".tmp")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def is_local(path: epath.Path) -> bool:
    """Whether a path is one of this machine's, not a gs:// address."""
    return "://" not in str(path)


def sync_folder(path: epath.Path) -> None:
    """Have a folder's new names on the disk too, if it is a local one."""
    if "://" in str(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
