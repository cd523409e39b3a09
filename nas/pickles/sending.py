"""Send a large evaluator to other processes once, not with each job.

A job then has a parcel that says where the pickle is. A small evaluator is in the parcel itself.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LARGE = 50_000  # bytes

_here: dict[str, bytes] = {}  # what was put into this process, by digest


@dataclass(frozen=True)
class Parcel:
    """Find a pickle on a worker: in a file, in the worker's memory, or here."""

    digest: str
    content: bytes | None = None
    file: str | None = None

    def __hash__(self) -> int:
        return hash(self.digest)  # not of megabytes

    def open(self) -> bytes:
        """Return the pickle."""
        if self.content is not None:
            return self.content
        return Path(self.file).read_bytes() if self.file else _here[self.digest]


Share = Callable[[bytes], Parcel]
"""Make a pickle available to all workers of a pool, and return how they find it."""


def in_each_job(pickled: bytes) -> Parcel:
    """Return a parcel with the pickle itself."""
    return Parcel(digest_of(pickled), content=pickled)


class SharedFiles:
    """Write large pickles to files for the processes of this machine."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def share(self, pickled: bytes) -> Parcel:
        """Return a parcel with the pickle, or with its file."""
        if len(pickled) < LARGE:
            return in_each_job(pickled)
        digest = digest_of(pickled)
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="nas-"))
        file = self._folder / digest
        file.write_bytes(pickled)
        return Parcel(digest, file=str(file))

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def put(digest: str, pickled: bytes) -> None:
    """Keep a pickle in this process."""
    _here[digest] = pickled


def remove(digest: str) -> None:
    """Keep it no longer."""
    _here.pop(digest, None)


def digest_of(pickled: bytes) -> str:
    """Return the digest by which a pickle is known."""
    return hashlib.blake2b(pickled, digest_size=16).hexdigest()
