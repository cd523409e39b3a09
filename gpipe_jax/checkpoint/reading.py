"""Read files and folders of checkpoints; distinguish damage from temporary failures."""

import errno
import os
import stat
from typing import TypeVar

import pydantic
from etils import epath

from gpipe_jax.errors import DamagedCheckpointError, UnreadableCheckpointError
from gpipe_jax.utils.atomic_files import is_local

T = TypeVar("T")


def read_bytes(path: epath.Path) -> bytes:
    """Return the content of a file.

    Raises:
        DamagedCheckpointError: There is no such file, or it is not a regular file.
        UnreadableCheckpointError: It cannot be read now, for any other reason.
    """
    try:
        # A pipe would never end.
        if is_local(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise DamagedCheckpointError(f"{path.name} is not a regular file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpointError(f"{path.name} is missing") from error
    except (DamagedCheckpointError, ImportError):
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedCheckpointError(f"{path.name} is a link to itself") from error
        raise _unreadable(path.name, error) from error
    except Exception as error:
        if is_local(path):
            raise
        raise _unreadable(path.name, error) from error  # clients of buckets raise their own errors


def list_folder(folder: epath.Path) -> list[epath.Path]:
    """Return the content of a folder; an empty list if there is no such folder.

    Raises:
        UnreadableCheckpointError: It cannot be read now.
    """
    try:
        if not is_local(folder) and not folder.is_dir():
            return []
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.islink(folder):
            return []
        problem = f"is a link to {os.readlink(folder)}, which is missing; mount that disk"
        raise UnreadableCheckpointError(f"{folder} {problem}") from error
    except ImportError:
        raise
    except Exception as error:
        if is_local(folder) and not isinstance(error, OSError):
            raise
        raise _unreadable(str(folder), error) from error


def _unreadable(name: str, error: Exception) -> UnreadableCheckpointError:
    reason = getattr(error, "strerror", None) or error
    return UnreadableCheckpointError(f"{name} cannot be read: {reason}")


def parse(data: bytes | str, adapter: pydantic.TypeAdapter[T]) -> T:
    """Return the content of a JSON text; check its form against a type.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has another form. The message is one
            line.
    """
    try:
        return adapter.validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
