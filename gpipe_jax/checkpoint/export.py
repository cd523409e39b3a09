"""A run's parameters as one plain file of arrays, named by layer: `layers.3.linear.kernel`."""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  so that numpy knows the names of its types
import numpy as np
from etils import epath

from gpipe_jax import errors
from gpipe_jax.checkpoint import format, safetensors
from gpipe_jax.checkpoint.format import COMMON, Manifest
from gpipe_jax.config.loader import no_package
from gpipe_jax.errors import ConfigError, DamagedCheckpointError

SUFFIXES = (".safetensors", ".npz")


def export(run: epath.Path, out: Path) -> dict[str, Any]:
    """Write what `gpipe eval` evaluates: parameters (their moving average, if any), statistics.

    Of the newest whole checkpoint of the run folder; no more than a layer is in memory at once.
    Returns what was written. Raises ConfigError.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError([f"--out {out} must end in {' or '.join(SUFFIXES)}"], "gpipe export")
    new, damaged = out.with_name(out.name + ".tmp"), []
    try:
        for found in format.manifests(run / "checkpoints"):
            if isinstance(found, Manifest):
                try:
                    figures = _write(found, new)
                    new.replace(out)
                    return {**figures, "damaged_steps": damaged, "out": str(out)}
                except DamagedCheckpointError:
                    damaged.append(found.step)
            else:
                damaged.append(found[0])
    except errors.CheckpointFormatError as error:
        raise ConfigError([str(error)], str(run)) from error
    except ImportError as error:
        problem = no_package(error)
        raise ConfigError([problem], str(run)) from error
    except (OSError, TypeError) as error:
        raise ConfigError([f"--out {out} cannot be written: {error}"], "gpipe export") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
    what = f"no whole checkpoint (damaged: {damaged})" if damaged else "no checkpoint to export"
    raise ConfigError([f"there is {what}; give the folder of a run"], str(run))


def _write(manifest: Manifest, path: Path) -> dict[str, Any]:
    names = _names(manifest)
    shapes = {
        new: (np.dtype(dtype), tuple(shape))
        for part, chosen in names.items()
        for new, (dtype, shape) in (
            (new, manifest.parts[part]["arrays"][old]) for old, new in chosen.items()
        )
    }
    arrays = _arrays(manifest, names)
    with path.open("wb") as file:
        if path.name.endswith(".npz.tmp"):
            _write_npz(file, shapes, arrays)
        else:
            layers = json.dumps([manifest.parts[part]["description"] for part in names])
            about = {"step": str(manifest.step), "layers": layers}
            safetensors.write(file, shapes, arrays, about)
    count = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in shapes.values())
    return {"step": manifest.step, "arrays": len(shapes), "numbers": count}


def _names(manifest: Manifest) -> dict[str, dict[str, str]]:
    """For each layer's part: name in the checkpoint -> name in the file."""
    parts = sorted((p for p in manifest.parts if p != COMMON), key=int)
    names = {part: list(manifest.parts[part]["arrays"]) for part in parts}
    averaged = any(name.startswith("average.") for one in names.values() for name in one)
    kinds = ("average." if averaged else "params.", "statistics.")
    return {
        part: {
            name: f"layers.{part}.{name.partition('.')[2]}"
            for kind in kinds
            for name in one
            if name.startswith(kind)
        }
        for part, one in names.items()
    }


def _arrays(manifest: Manifest, names: dict[str, dict[str, str]]) -> Iterator[np.ndarray]:
    for part, chosen in names.items():
        arrays = format.read_part(manifest, part)
        yield from (arrays[name] for name in chosen)


def _write_npz(file: BinaryIO, shapes: dict, arrays: Iterator[np.ndarray]) -> None:
    for name, (dtype, _) in shapes.items():
        if dtype.kind not in "biuf":
            raise TypeError(f"{name} has type {dtype}, which .npz does not keep; use .safetensors")
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in zip(shapes, arrays, strict=True):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
