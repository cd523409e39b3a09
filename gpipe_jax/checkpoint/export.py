"""Write a run's parameters as one file of arrays, named by layer: `layers.3.linear.kernel`."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  so that numpy knows the names of its types
import numpy as np
from etils import epath

from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint import safetensors
from gpipe_jax.checkpoint.by_layer import not_finite
from gpipe_jax.checkpoint.manifest import CHECKPOINTS, COMMON, Manifest, UnusableStep, unusable
from gpipe_jax.config.loader import no_package, no_run
from gpipe_jax.errors import (
    ArgumentError,
    CheckpointFormatError,
    ConfigError,
    DamagedCheckpointError,
    UnreadableCheckpointError,
)
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.messages import say

SUFFIXES = (".safetensors", ".npz")


def export(run: epath.Path, out: Path) -> dict[str, Any]:
    """Write what `gpipe eval` evaluates: parameters (or their moving average) and statistics.

    The source is the newest intact checkpoint of the run; a message names newer ones that cannot be
    used. Only one layer is in memory at a time.

    Args:
        run: The folder of the run.
        out: The file to write. Its suffix chooses the format: .safetensors or .npz.

    Returns:
        Figures: step, arrays, numbers (elements in all), damaged_steps, out.

    Raises:
        ArgumentError: The suffix is unknown, or the file cannot be written.
        ConfigError: There is no intact checkpoint.
        UnreadableCheckpointError: No checkpoint can be read now.
    """
    if out.suffix not in SUFFIXES:
        raise ArgumentError("out", f"{out} must end in {' or '.join(SUFFIXES)}")
    skipped: list[UnusableStep] = []
    try:
        for manifest in checkpoint_manifest.manifests(run / CHECKPOINTS):
            result = _try_to_write(manifest, out) if isinstance(manifest, Manifest) else manifest
            if not isinstance(result, UnusableStep):
                damaged = [found.step for found in skipped if found.is_damaged]
                return {**result, "damaged_steps": damaged, "out": str(out)}
            skipped.append(result)
            say(f"checkpoint {run / CHECKPOINTS / str(result.step)}: {result.reason}")
    except CheckpointFormatError as error:
        raise ConfigError([str(error)], str(run)) from error
    except ImportError as error:
        raise ConfigError([no_package(error)], str(run)) from error
    except UnreadableCheckpointError:
        raise
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error  # without the name of the draft
        raise ArgumentError("out", f"{out} cannot be written: {reason}") from error
    raise _nothing_to_export(run, skipped)


def _nothing_to_export(run: epath.Path, skipped: list[UnusableStep]) -> Exception:
    if not all(found.is_damaged for found in skipped):
        return UnreadableCheckpointError(
            f"no checkpoint of {run} can be used, and some cannot be read now; repair the disk or "
            f"the permissions, and run the same command again"
        )
    if not run.exists():
        return ConfigError([no_run(run)], str(run))
    damaged = [found.step for found in skipped]
    reason = f"no whole checkpoint (damaged: {damaged})" if damaged else "no checkpoint to export"
    return ConfigError([f"there is {reason}; give the folder of a run"], str(run))


def _try_to_write(manifest: Manifest, out: Path) -> dict[str, Any] | UnusableStep:
    """Write a checkpoint's arrays; return the figures, or why it cannot be used."""
    try:
        with atomic_files.replacing(out) as draft, draft.open("wb") as file:
            return _write(manifest, file, out.suffix)
    except (DamagedCheckpointError, UnreadableCheckpointError) as error:
        return unusable(manifest.step, error)


def _write(manifest: Manifest, file: BinaryIO, suffix: str) -> dict[str, Any]:
    names = _names(manifest)
    shapes = {}
    for layer, renamed in names.items():
        for saved, exported in renamed.items():
            dtype, shape = manifest.files[layer]["arrays"][saved]
            shapes[exported] = (np.dtype(dtype), tuple(shape))
    arrays = _arrays(manifest, names)
    if suffix == ".npz":
        _write_npz(file, shapes, arrays)
    else:
        layers = json.dumps([manifest.files[layer]["description"] for layer in names])
        about = {"step": str(manifest.step), "layers": layers}
        safetensors.write(file, shapes, arrays, about)
    count = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in shapes.values())
    return {"step": manifest.step, "arrays": len(shapes), "numbers": count}


def _names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return for each layer {name in the checkpoint: name in the exported file}."""
    layers = sorted((name for name in manifest.files if name != COMMON), key=int)
    return {layer: exported_names(list(manifest.files[layer]["arrays"]), layer) for layer in layers}


def exported_names(saved: list[str], layer: str) -> dict[str, str]:
    """Return the names of a layer's parameters, averaged ones where there are any, and statistics.

    A frozen parameter has no average.
    """
    chosen = {}
    for tree in ("params", "average", "statistics"):  # an average takes its parameter's place
        for name in saved:
            if name.startswith(f"{tree}."):
                chosen[f"layers.{layer}.{name.partition('.')[2]}"] = name
    return {name: exported for exported, name in chosen.items()}


def _arrays(manifest: Manifest, names: dict[str, dict[str, str]]) -> Iterator[np.ndarray]:
    for layer, renamed in names.items():
        arrays = checkpoint_format.read_file(manifest, layer)
        if bad := not_finite({name: arrays[name] for name in renamed}):
            raise DamagedCheckpointError(f"layer {layer}, {bad[0]}, holds NaN or infinity")
        yield from (arrays[name] for name in renamed)


def _write_npz(file: BinaryIO, shapes: dict, arrays: Iterator[np.ndarray]) -> None:
    for name, (dtype, _) in shapes.items():
        if dtype.kind not in "biuf":
            raise TypeError(f"{name} has type {dtype}, which .npz does not keep; use .safetensors")
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in zip(shapes, arrays, strict=True):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
