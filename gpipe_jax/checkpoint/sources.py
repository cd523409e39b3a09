"""Read named arrays for a warm start: from checkpoints and files, from trees, or from a module."""

import functools
import io
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import nnx

from gpipe_jax.checkpoint import export, locate, safetensors
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.manifest import COMMON, Manifest
from gpipe_jax.errors import ArgumentError, CheckpointFormatError, DamagedCheckpointError
from gpipe_jax.pipeline.state import State, TrainState
from gpipe_jax.utils import paths
from gpipe_jax.utils.trees import by_name

_PREFIX = "layers."  # of the names in exported files


class Arrays(NamedTuple):
    """Hold the shapes of named arrays, such as "3.linear.kernel", and a function that reads one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def arrays_of(argument: str, source: Any) -> Arrays:
    """Return the arrays of a source.

    Args:
        argument: The name of the argument or setting, for messages.
        source: The path of a checkpoint (see `locate`) or of an exported file, trees layer by
            layer, a tree by name, or an `nnx.Module`.

    Raises:
        ArgumentError: It is none of these, or cannot be read.
    """
    if isinstance(source, str | PathLike):
        place = paths.anywhere(argument, source)
        if place.suffix not in export.SUFFIXES or not place.is_file():
            return _of_checkpoint(argument, source)
        source = _of_file(argument, place)
    if isinstance(source, nnx.Module):
        source = nnx.to_pure_dict(nnx.state(source, (nnx.Param, nnx.BatchStat)))
    if isinstance(source, State | TrainState) or not isinstance(source, Mapping | list | tuple):
        raise ArgumentError(
            argument,
            f"`{argument}` must be the path of a checkpoint, a list of one tree for each layer, a "
            f"dict of arrays or an nnx.Module, got {type(source).__name__}; of a state, give "
            f"pipe.to_layers(state); of a Linen module, give its params",
        )
    tree = dict(source) if isinstance(source, Mapping) else list(source)
    try:
        arrays = by_name(tree)
    except ValueError as error:
        raise ArgumentError(argument, f"`{argument}` cannot be used: {error}") from error
    named = {name.removeprefix(_PREFIX): np.asarray(a) for name, a in arrays.items()}
    return Arrays({name: a.shape for name, a in named.items()}, named.__getitem__)


def _of_file(argument: str, path: epath.Path) -> dict[str, np.ndarray]:
    """Return the arrays of an exported file, by name."""
    try:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            return safetensors.read(data)
        with np.load(io.BytesIO(data)) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError(
            argument, f"`{argument}` {path} cannot be read: {error}; export the run again"
        ) from error


def _of_checkpoint(argument: str, path: str | PathLike[str]) -> Arrays:
    """Return the arrays of the newest checkpoint: averages take the place of parameters."""
    manifest = _newest(argument, path)
    places = {
        exported.removeprefix(_PREFIX): (layer, saved)
        for layer, file in manifest.files.items()
        if layer != COMMON
        for saved, exported in export.exported_names(list(file["arrays"]), layer).items()
    }

    @functools.lru_cache(maxsize=1)  # the arrays of a layer are asked for one after the other
    def file_of(layer: str) -> dict[str, np.ndarray]:
        try:
            return checkpoint_format.read_file(manifest, layer)
        except DamagedCheckpointError as error:
            raise _unusable(argument, path, manifest.step, str(error)) from error

    def read(name: str) -> np.ndarray:
        layer, saved = places[name]
        return file_of(layer)[saved]

    shapes = {
        name: tuple(manifest.files[layer]["arrays"][saved][1])
        for name, (layer, saved) in places.items()
    }
    return Arrays(shapes, read)


def _newest(argument: str, path: str | PathLike[str]) -> Manifest:
    found = locate.locate(argument, path)
    newest = found.steps[:1]
    try:
        manifest = next(checkpoint_manifest.manifests(found.folder, newest))
    except CheckpointFormatError as error:
        raise ArgumentError(argument, f"`{argument}` {path}: {error}") from error
    if isinstance(manifest, Manifest):
        return manifest
    raise _unusable(argument, path, manifest.step, manifest.reason)


def _unusable(argument: str, path: Any, step: int, reason: str) -> ArgumentError:
    return ArgumentError(
        argument,
        f"`{argument}` {path}: the checkpoint of step {step} cannot be used: {reason}; give the "
        f"folder of an older one itself",
    )
