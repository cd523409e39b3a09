"""Read and write manifests, which describe checkpoints, and find the checkpoints of a run.

    <step>/state/manifest.json    {"crc32": of the content, "content": a JSON text}

Checksums say nothing about what was written, so the form of the content is checked too.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Annotated, Any, NamedTuple

import pydantic
from etils import epath

from gpipe_jax.checkpoint import reading
from gpipe_jax.checkpoint.safetensors import ChecksummedFile
from gpipe_jax.config.base import LARGEST
from gpipe_jax.errors import (
    CheckpointFormatError,
    DamagedCheckpointError,
    UnreadableCheckpointError,
)
from gpipe_jax.utils import atomic_files

STATE, MANIFEST, COMMON = "state", "manifest.json", "common"
CHECKPOINTS = "checkpoints"  # the folder of all checkpoints of a run
COMMITTED = "commit_success.txt"  # the file by which Orbax marks a complete checkpoint on gs://
_STEP = re.compile(r"0|[1-9][0-9]{0,9}")  # the name of a checkpoint's folder
FORMAT = 1  # number of the format that this version writes and reads
PACKAGES = ("gpipe-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Describe the run and the step of a checkpoint: what the manifest says besides the files.

    `save` passes these fields on unopened. A new field needs a default, so that manifests of older
    versions, which do not have it, can still be read.
    """

    step: int
    config: dict  # of the run, as `Config.model_dump`
    metrics: dict[str, float] | None  # of the evaluation at this step, if there was one
    data: dict = dataclasses.field(default_factory=dict)  # as `data.stream.fingerprint`
    cut: list[int] | None = None  # the first layer of each stage but the first


@dataclasses.dataclass(frozen=True)
class Manifest(RunInfo):
    """Describe a checkpoint: its run, its files and the versions that wrote it."""

    path: epath.Path = dataclasses.field(kw_only=True)  # of the folder of the files
    # By "common" or a layer's id: description of the layer, arrays, bytes, crc32.
    files: dict[str, dict] = dataclasses.field(kw_only=True)
    versions: dict[str, str] = dataclasses.field(kw_only=True)


class UnusableStep(NamedTuple):
    """Name a checkpoint that cannot be used, and say why."""

    step: int
    reason: str
    is_damaged: bool  # else it cannot be read now, but perhaps later


def unusable(step: int, error: DamagedCheckpointError | UnreadableCheckpointError) -> UnusableStep:
    """Return the checkpoint of a step as one that could not be used, because of this error."""
    return UnusableStep(step, str(error), isinstance(error, DamagedCheckpointError))


# The parts of `_Content`; `pydantic` checks them.
_Size = Annotated[int, pydantic.Field(ge=0)]
_FileName = Annotated[str, pydantic.Field(pattern=rf"^({COMMON}|0|[1-9][0-9]*)$")]


@dataclasses.dataclass(frozen=True)
class _File:
    """Describe a file as the manifest does."""

    description: str
    arrays: dict[str, tuple[str, list[_Size]]]
    bytes: _Size
    crc32: _Size


@dataclasses.dataclass(frozen=True)
class _Content(RunInfo):
    """Describe the content of a manifest."""

    parts: dict[_FileName, _File] = dataclasses.field(kw_only=True)
    versions: dict[str, str] = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class _Outer:
    """Describe the manifest's file."""

    crc32: int
    content: str


_OUTER, _CONTENT = pydantic.TypeAdapter(_Outer), pydantic.TypeAdapter(_Content)
_ANY_FORMAT = pydantic.TypeAdapter(dict[str, Any])


def write_manifest(folder: epath.Path, files: Mapping[str, dict], info: RunInfo) -> None:
    """Write the manifest; everything else must have been written before."""
    run = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    content = {"format": FORMAT, "versions": _versions(), **run, "parts": files}
    text = json.dumps(content)
    with (folder / MANIFEST).open("wb") as file:
        stream = ChecksummedFile(file)
        stream.write(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}).encode())
        stream.sync()
    atomic_files.sync_folder(folder)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def steps(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, intact or not, the newest first.

    A checkpoint is named `str(step)`; other names, such as 0050, are ignored.

    Raises:
        UnreadableCheckpointError: The folder cannot be read.
    """
    paths = reading.list_folder(folder)
    found = [(int(path.name), path) for path in paths if _STEP.fullmatch(path.name)]
    return sorted((s for s, path in found if s <= LARGEST and _is_committed(path)), reverse=True)


def _is_committed(path: epath.Path) -> bool:
    """Return whether a checkpoint's writer has finished.

    On a file system a folder gets its name when it is complete; on gs:// Orbax then adds a file.
    """
    return not str(path).startswith("gs://") or (path / COMMITTED).exists()


def read_manifest(folder: epath.Path, step: int) -> Manifest:
    """Read the manifest of one step's checkpoint.

    Raises:
        DamagedCheckpointError: The manifest is missing or damaged.
        UnreadableCheckpointError: It cannot be read now.
        CheckpointFormatError: Another version wrote it, in another format.
    """
    path = folder / str(step) / STATE
    data = reading.read_bytes(path / MANIFEST)
    try:
        outer = reading.parse(data, _OUTER)
        if zlib.crc32(outer.content.encode()) != outer.crc32:
            raise DamagedCheckpointError(f"{MANIFEST} does not have its checksum")
        found = reading.parse(outer.content, _ANY_FORMAT)
        if type(number := found.get("format")) is not int:
            raise ValueError(f"format: {number!r} is not a number")
        if number != FORMAT:
            raise _other_format(path, number, found.get("versions"))
        content = reading.parse(outer.content, _CONTENT)
    except (DamagedCheckpointError, CheckpointFormatError):
        raise
    except ValueError as error:
        raise DamagedCheckpointError(f"{MANIFEST} is malformed: {error}") from error
    if content.step != step:
        raise DamagedCheckpointError(f"{MANIFEST} is that of step {content.step}")
    run = {field.name: getattr(content, field.name) for field in dataclasses.fields(RunInfo)}
    return Manifest(**run, path=path, files=found["parts"], versions=content.versions)


def _other_format(path: epath.Path, number: int, versions: Any) -> CheckpointFormatError:
    writer = versions.get("gpipe-jax") if isinstance(versions, dict) else None
    return CheckpointFormatError(
        f"the checkpoint {path} has format {number}, this version reads {FORMAT}; "
        f"use the version that wrote it ({writer or 'it names none'})"
    )


def manifests(
    folder: epath.Path, only: Iterable[int] | None = None
) -> Iterator[Manifest | UnusableStep]:
    """Yield the manifests in a folder, the newest first, or those of the steps `only`."""
    for step in steps(folder) if only is None else only:
        try:
            yield read_manifest(folder, step)
        except (DamagedCheckpointError, UnreadableCheckpointError) as error:
            yield unusable(step, error)


def rename_step(folder: epath.Path, step: int, why: str) -> epath.Path:
    """Rename a checkpoint to `<step>.<why>`, a free name, and return its path."""
    new, count = folder / f"{step}.{why}", 1
    while new.exists():
        new, count = folder / f"{step}.{why}-{count}", count + 1
    (folder / str(step)).rename(new)
    return new
