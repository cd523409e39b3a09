"""Saved training states by global layer id: un-stacked, un-padded, the same for any K, V and D.

    <step>/state/0.safetensors, 1.safetensors, ...   one file for each layer
    <step>/state/common.safetensors                  what no layer has: seed, the optimizer's counts
    <step>/state/manifest.json                       written last; without it nothing counts

The manifest has each file's size and checksum, and its own, so that a checkpoint that was cut off
or damaged is never taken for a whole one. `saving` writes these files, through Orbax.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gpipe_jax.checkpoint import safetensors
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.errors import CheckpointFormatError, DamagedCheckpointError
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.trees import by_name, from_names

STATE, MANIFEST, COMMON = "state", "manifest.json", "common"
COMMITTED = "commit_success.txt"
FORMAT = 1
PACKAGES = ("gpipe-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Manifest(NamedTuple):
    """What a checkpoint says of itself."""

    path: epath.Path  # of the folder of its files
    step: int
    parts: dict[str, dict]  # "common" or a layer's id -> description, arrays, bytes, crc32
    config: dict  # of the run, as `Config.model_dump`
    metrics: dict | None  # of the evaluation at this step, if there was one
    versions: dict[str, str]
    data: dict  # what the data set was, as `stream.identity` tells it; not in the oldest ones


# --- writing --------------------------------------------------------------------------------------


def write_part(path: epath.Path, part: str, tree: Any, description: str = "") -> dict:
    """Write one part's file; what the manifest is to say of it."""
    arrays = {name: np.asarray(a) for name, a in by_name(tree).items()}
    with (path / f"{part}.safetensors").open("wb") as file:
        summed = safetensors.Summed(file)
        safetensors.write_all(summed, arrays)
        summed.sync()
    return {
        "description": description,
        "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
        "bytes": summed.size,
        "crc32": summed.crc32,
    }


def write_manifest(path: epath.Path, parts: Mapping[str, dict], about: Mapping[str, Any]) -> None:
    """Write the manifest, after everything else: `about` has step, config, metrics and data."""
    content = {"format": FORMAT, "versions": _versions(), **about, "parts": parts}
    text = json.dumps(content)
    with (path / MANIFEST).open("wb") as file:
        summed = safetensors.Summed(file)
        summed.write(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}).encode())
        summed.sync()
    atomic_files.sync_folder(path)


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


# --- reading --------------------------------------------------------------------------------------


def steps(folder: epath.Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdecimal() and _is_committed(p))
    return sorted((int(p.name) for p in found), reverse=True)


def _is_committed(path: epath.Path) -> bool:
    """Whether it is not one that is being written, or that its writer did not live to finish.

    On a file system a folder gets its name when it is complete; on gs:// Orbax adds a file then.
    """
    return not str(path).startswith("gs://") or (path / COMMITTED).exists()


def read_manifest(folder: epath.Path, step: int) -> Manifest:
    """The manifest of a step's checkpoint. Raises DamagedError or FormatError."""
    path = folder / str(step) / STATE
    try:
        outer = json.loads((path / MANIFEST).read_bytes())
        text = outer["content"]
        if zlib.crc32(text.encode()) != outer["crc32"]:
            raise DamagedCheckpointError(f"{MANIFEST} does not have its checksum")
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (
            error if isinstance(error, DamagedCheckpointError) else f"{MANIFEST} cannot be read"
        )
        raise DamagedCheckpointError(str(reason)) from error
    if content["format"] != FORMAT:
        raise CheckpointFormatError(
            f"the checkpoint {path} has format {content['format']}, this version reads {FORMAT}; "
            f"use the version that wrote it ({content['versions']['gpipe-jax']})"
        )
    if content["step"] != step:
        raise DamagedCheckpointError(f"{MANIFEST} is that of step {content['step']}")
    content.setdefault("data", {})
    return Manifest(path, **{name: content[name] for name in Manifest._fields[1:]})


def manifests(
    folder: epath.Path, those: Iterable[int] | None = None
) -> Iterator[Manifest | tuple[int, DamagedCheckpointError]]:
    """The manifests in a folder, the newest first, or of `those` steps.

    For one that is damaged, its step and why.
    """
    for step in steps(folder) if those is None else those:
        try:
            yield read_manifest(folder, step)
        except DamagedCheckpointError as error:
            yield step, error


def read_part(manifest: Manifest, part: str) -> dict[str, np.ndarray]:
    """The arrays of a layer, or of "common", by name. Raises DamagedError."""
    entry, name = manifest.parts[part], f"{part}.safetensors"
    try:
        data = (manifest.path / name).read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{name} is missing") from error
    if len(data) != entry["bytes"]:
        raise DamagedCheckpointError(f"{name} has {len(data)} bytes, not {entry['bytes']}")
    if zlib.crc32(data) != entry["crc32"]:
        raise DamagedCheckpointError(f"{name} does not have its checksum")
    return safetensors.read(data)


class _Lazy(Mapping[int, Any]):
    """Layers that are read, and checked, when they are asked for."""

    def __init__(self, ids: list[int], read: Callable[[int], Any]) -> None:
        self._ids, self._read = ids, read

    def __getitem__(self, i: int) -> Any:
        return self._read(i)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def load(manifest: Manifest, like: LayerTrees, descriptions: list[str]) -> LayerTrees:
    """A checkpoint as a state like `like` (of shapes), each layer read when it is asked for.

    Raises ValueError, listing them, if layers or arrays are missing, unknown or different; and
    DamagedError, also when a layer is asked for.
    """
    _check_fits(manifest, like, descriptions)

    def layer(i: int) -> Any:
        return from_names(like.layers[i], read_part(manifest, str(i)))

    common = read_part(manifest, COMMON)
    return LayerTrees({name: common[name] for name in like.common}, _Lazy(list(like.layers), layer))


def _check_fits(manifest: Manifest, like: LayerTrees, descriptions: list[str]) -> None:
    wanted = {str(i): tree for i, tree in like.layers.items()} | {COMMON: like.common}
    problems = [f"missing {_layer(p)}" for p in wanted if p not in manifest.parts]
    problems += [f"unknown {_layer(p)}" for p in manifest.parts if p not in wanted]
    for part, tree in wanted.items():
        if part in manifest.parts:
            here = descriptions[int(part)] if part != COMMON else ""
            there = manifest.parts[part]["description"]
            found = _differences(manifest.parts[part]["arrays"], tree)
            found += [f"is {there} there, {here} here"] if there != here else []
            problems += [f"{_layer(part)}: {line}" for line in found]
    if problems:
        raise ValueError(
            f"the checkpoint {manifest.path.parent} does not fit this run: {'; '.join(problems)}"
        )


def _layer(part: str) -> str:
    return "common" if part == COMMON else f"layer {part}"


def _differences(saved: dict[str, list], tree: Any) -> list[str]:
    wanted = {name: [str(a.dtype), list(a.shape)] for name, a in by_name(tree).items()}
    lines = [f"missing {name}" for name in wanted if name not in saved]
    lines += [f"unknown {name}" for name in saved if name not in wanted]
    show = lambda entry: f"{entry[0]}{entry[1]}"  # noqa: E731
    return lines + [
        f"{name} is {show(saved[name])} there, {show(entry)} here"
        for name, entry in wanted.items()
        if name in saved and saved[name] != entry
    ]
