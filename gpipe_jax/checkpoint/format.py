"""Read and write a training state as files, one per layer: the same for any K, V and D.

    <step>/state/0.safetensors, 1.safetensors, ...   one file per layer, by global layer id
    <step>/state/common.safetensors                  what no layer has: seed, optimizer's counts
    <step>/state/manifest.json                       written last; without it nothing counts

Arrays have the layers' own shapes: neither stacked nor padded. The manifest holds the size and the
checksum of each file, and its own checksum. So a checkpoint that is incomplete or damaged is never
taken for an intact one. Checksums say nothing about what was written, so everything that is read is
also compared with what it must be. `checkpoint.save` writes these files through Orbax.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
from etils import epath

from gpipe_jax.checkpoint import reading, safetensors
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.errors import (
    CheckpointFormatError,
    DamagedCheckpointError,
    UnreadableCheckpointError,
)
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.trees import by_name, from_names

STATE, MANIFEST, COMMON = "state", "manifest.json", "common"
COMMITTED = "commit_success.txt"  # the file by which Orbax marks a complete checkpoint on gs://
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
    is_damaged: bool  # else it cannot be read now, which may pass


def unusable(step: int, error: DamagedCheckpointError | UnreadableCheckpointError) -> UnusableStep:
    """Return the checkpoint of a step as one that could not be used, because of this error."""
    return UnusableStep(step, str(error), isinstance(error, DamagedCheckpointError))


# What `_Content` holds in JSON; `pydantic` checks it.
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


# --- writing --------------------------------------------------------------------------------------


def write_file(folder: epath.Path, name: str, tree: Any, description: str = "") -> dict:
    """Write the file of one layer, or of "common"; return its entry in the manifest."""
    arrays = {array_name: np.asarray(a) for array_name, a in by_name(tree).items()}
    with (folder / f"{name}.safetensors").open("wb") as file:
        stream = safetensors.ChecksummedFile(file)
        safetensors.write_all(stream, arrays)
        stream.sync()
    return {
        "description": description,
        "arrays": {array_name: [str(a.dtype), list(a.shape)] for array_name, a in arrays.items()},
        "bytes": stream.size,
        "crc32": stream.crc32,
    }


def write_manifest(folder: epath.Path, files: Mapping[str, dict], info: RunInfo) -> None:
    """Write the manifest; everything else must have been written before."""
    run = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
    content = {"format": FORMAT, "versions": _versions(), **run, "parts": files}
    text = json.dumps(content)
    with (folder / MANIFEST).open("wb") as file:
        stream = safetensors.ChecksummedFile(file)
        stream.write(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}).encode())
        stream.sync()
    atomic_files.sync_folder(folder)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


# --- reading --------------------------------------------------------------------------------------


def steps(folder: epath.Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, intact or not, the newest first.

    A checkpoint is named as `str(step)`; other names, such as 0050, are none of this module's.

    Raises:
        UnreadableCheckpointError: The folder cannot be read.
    """
    paths = reading.list_folder(folder)
    named = (path for path in paths if re.fullmatch(r"0|[1-9][0-9]{0,9}", path.name))
    return sorted((int(path.name) for path in named if _is_committed(path)), reverse=True)


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
            raise ValueError(f"format: {number!r} is no number")
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


def rename_step(folder: epath.Path, step: int, why: str) -> None:
    """Rename a checkpoint that cannot be used to `<step>.<why>`; nothing is removed."""
    new, count = folder / f"{step}.{why}", 1
    while new.exists():
        new, count = folder / f"{step}.{why}-{count}", count + 1
    (folder / str(step)).rename(new)


def read_file(manifest: Manifest, name: str) -> dict[str, np.ndarray]:
    """Read the arrays of a layer, or of "common", by name.

    Raises:
        DamagedCheckpointError: The file is missing, or not as the manifest describes it.
        UnreadableCheckpointError: It cannot be read now.
    """
    entry, file_name = manifest.files[name], f"{name}.safetensors"
    data = reading.read_bytes(manifest.path / file_name)
    if len(data) != entry["bytes"]:
        raise DamagedCheckpointError(f"{file_name} has {len(data)} bytes, not {entry['bytes']}")
    if zlib.crc32(data) != entry["crc32"]:
        raise DamagedCheckpointError(f"{file_name} does not have its checksum")
    try:
        arrays = safetensors.read(data)
    except ValueError as error:
        raise DamagedCheckpointError(f"{file_name} is malformed: {error}") from error
    if differences := _differences(entry["arrays"], arrays):
        listed = "; ".join(differences)
        raise DamagedCheckpointError(f"{file_name} is not as {MANIFEST} describes it: {listed}")
    return arrays


class _LazyLayers(Mapping[int, Any]):
    """Read and check a layer each time it is looked up."""

    def __init__(self, ids: list[int], read: Callable[[int], Any]) -> None:
        self._ids, self._read = ids, read

    def __getitem__(self, i: int) -> Any:
        return self._read(i)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def load(manifest: Manifest, like: LayerTrees, descriptions: list[str]) -> LayerTrees:
    """Return a checkpoint as a state like `like`, which holds shapes.

    Each layer is read when it is looked up, and not kept.

    Args:
        manifest: The checkpoint.
        like: Shapes and types of the state of this run.
        descriptions: `str(layer)` of each layer of this run.

    Raises:
        ValueError: Layers or arrays are missing, unknown or different; lists all of them.
        DamagedCheckpointError: A file is damaged; also when a layer is looked up later.
    """
    _check_fits(manifest, like, descriptions)

    def layer(i: int) -> Any:
        return from_names(like.layers[i], read_file(manifest, str(i)))

    common = read_file(manifest, COMMON)
    layers = _LazyLayers(list(like.layers), layer)
    return LayerTrees({name: common[name] for name in like.common}, layers)


def _check_fits(manifest: Manifest, like: LayerTrees, descriptions: list[str]) -> None:
    expected = {str(i): tree for i, tree in like.layers.items()} | {COMMON: like.common}
    problems = [f"missing {_title(name)}" for name in expected if name not in manifest.files]
    problems += [f"unknown {_title(name)}" for name in manifest.files if name not in expected]
    for name, tree in expected.items():
        if name in manifest.files:
            now = descriptions[int(name)] if name != COMMON else ""
            saved = manifest.files[name]["description"]
            lines = _differences(manifest.files[name]["arrays"], tree)
            if saved != now:
                lines.append(f"was {saved}, is {now} now")
            problems += [f"{_title(name)}: {line}" for line in lines]
    if problems:
        raise ValueError(
            f"the checkpoint {manifest.path.parent} does not fit this run: {'; '.join(problems)}"
        )


def _title(name: str) -> str:
    return "common" if name == COMMON else f"layer {name}"


def _differences(saved: dict[str, list], tree: Any) -> list[str]:
    expected = {name: [str(a.dtype), list(a.shape)] for name, a in by_name(tree).items()}
    lines = [f"missing {name}" for name in expected if name not in saved]
    lines += [f"unknown {name}" for name in saved if name not in expected]
    return lines + [
        f"{name} was {_show(saved[name])}, is {_show(entry)} now"
        for name, entry in expected.items()
        if name in saved and saved[name] != entry
    ]


def _show(entry: list) -> str:
    dtype, shape = entry
    return f"{dtype}{shape}"
