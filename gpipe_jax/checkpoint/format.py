"""Read and write a training state as files, one per layer: the same for any K, V and D.

    <step>/state/0.safetensors, 1.safetensors, ...   one file per layer, by global layer id
    <step>/state/common.safetensors                  what no layer has: seed, optimizer's counts
    <step>/state/manifest.json                       written last; without it nothing counts

Arrays have the layers' own shapes: neither stacked nor padded. The manifest holds the size and the
checksum of each file, and its own checksum. So a checkpoint that is incomplete or damaged is never
taken for an intact one. `checkpoint.save` writes these files through Orbax.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from gpipe_jax.checkpoint import reading, safetensors
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.checkpoint.manifest import COMMON, MANIFEST, Manifest
from gpipe_jax.errors import DamagedCheckpointError
from gpipe_jax.utils.trees import by_name, from_names

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


# --- reading --------------------------------------------------------------------------------------


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
        ValueError: Layers or arrays are missing, unknown or different. It lists all of them, or
            three if the parameters fit and only what the optimizer has for them does not.
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
            f"the checkpoint {manifest.path.parent} does not fit this run: {_listed(problems)}"
        )


def _listed(problems: list[str]) -> str:
    """Return all problems, but only three if all are of the optimizer's state or the average."""
    of_training = re.compile(r"[^:]+: (missing |unknown )?(optimizer|average)\.")
    if not all(of_training.match(problem) for problem in problems):
        return "; ".join(problems)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    shown = "; ".join(problems[:3])
    parts = [part for part in ("optimizer", "average") if any(f"{part}." in p for p in problems)]
    verb = "differs" if len(parts) == 1 else "differ"
    return f"the {' and the '.join(parts)} (or what is frozen) {verb}: {shown}{more}"


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
