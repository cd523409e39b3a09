"""Store trained weights in files, from which children inherit.

The format is safetensors. The names are the paths of the arrays in their tree. The metadata hold
the genotype, which says what each array was.
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
    """Write a file; a process that is killed meanwhile leaves none of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(values))
    arrays = {jax.tree_util.keystr(key): np.asarray(a) for key, a in leaves}
    shapes = {name: (a.dtype, a.shape) for name, a in arrays.items()}
    with atomic_files.replacing(path) as draft, draft.open("wb") as file:
        checksummed = safetensors.ChecksummedFile(file)
        metadata = {"genotype": genotype.to_json()}
        safetensors.write(checksummed, shapes, arrays.values(), metadata)
        checksummed.sync()


def load(path: Path, network: Network) -> tuple[Architecture, Variables]:
    """Read a file.

    Returns:
        The architecture that was trained, and its values.

    Raises:
        ValueError: The file cannot be read, or holds another network's values.
    """
    try:
        content = path.read_bytes()
        genotype = Genotype.from_json(_metadata(content)["genotype"])
        arrays = safetensors.read(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"trained weights {path} cannot be read ({type(error).__name__}: {error}); remove the "
            "file to train its candidate from scratch"
        ) from error
    architecture = network.encode(genotype)
    shapes = jax.eval_shape(network.init, architecture, jax.random.key(0))

    def find(key: tuple, expected: Any) -> np.ndarray:
        name = jax.tree_util.keystr(key)
        array = arrays.get(name)
        if array is None or array.shape != expected.shape:
            stored = "missing" if array is None else f"of shape {list(array.shape)}"
            raise ValueError(
                f"trained weights {path} are of another network: {name} is {stored}, and this "
                f"network needs {list(expected.shape)}; resume with the settings of before"
            )
        return array

    return architecture, jax.tree.map_with_path(find, shapes)


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]
