"""Trained values as files, written at once or not at all, from which children inherit.

The format is safetensors; the names are the paths of the values in their tree, and the metadata the
genotype, by which a child knows what each of them was.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpipe_jax.checkpoint import safetensors
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils import atomic_files
from nas.training.network import Architecture, Network, Variables


def save(path: Path, genotype: Genotype, values: Variables) -> None:
    """Write a file; a process that is killed meanwhile leaves none of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(values))
    arrays = {jax.tree_util.keystr(key): np.asarray(a) for key, a in leaves}
    shapes = {name: (a.dtype, a.shape) for name, a in arrays.items()}
    with atomic_files.replacing(path, durable=True) as draft, draft.open("wb") as file:
        safetensors.write(file, shapes, arrays.values(), {"genotype": genotype.to_json()})


def load(path: Path, network: Network) -> tuple[Architecture, Variables]:
    """Whose values they are, and the values; ValueError if the file holds no such network's."""
    try:
        content = path.read_bytes()
        genotype = Genotype.from_json(_metadata(content)["genotype"])
        arrays = safetensors.read(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"trained values {path} cannot be read ({type(error).__name__}: {error}): remove the "
            "file, and its candidate trains from scratch"
        ) from error
    architecture = network.encode(genotype)
    shapes = jax.eval_shape(network.init, architecture, jax.random.key(0))

    def find(key: tuple, like: Any) -> np.ndarray:
        found = arrays.get(jax.tree_util.keystr(key))
        if found is None or found.shape != like.shape:
            have = "none" if found is None else f"shape {list(found.shape)}"
            raise ValueError(
                f"trained values {path} are of another network: {jax.tree_util.keystr(key)} has "
                f"{have} there and {list(like.shape)} here; resume with the settings of before"
            )
        return found

    return architecture, jax.tree.map_with_path(find, shapes)


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]
