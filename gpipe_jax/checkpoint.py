"""Saved training states, by global layer: un-stacked, un-padded, the same for any number of stages.

Orbax does the writing; its types stay in this file.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


def save(folder: Path, step: int, tree: PyTree) -> None:
    """Write `tree`, of numpy arrays, as the checkpoint of `step`; the one before it is kept."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(_names(tree)))


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore(folder: Path, step: int, like: PyTree) -> PyTree:
    """The checkpoint of `step`, as a tree like `like` (of arrays or shapes).

    Raises ValueError, listing them, if arrays are missing, unknown or of another shape.
    """
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        saved = manager.restore(step, args=ocp.args.StandardRestore())
    wanted = _names(like)
    problems = [f"missing {n}" for n in wanted.keys() - saved.keys()]
    problems += [f"unknown {n}" for n in saved.keys() - wanted.keys()]
    problems += [
        f"{n} has shape {list(saved[n].shape)}, wanted {list(wanted[n].shape)}"
        for n in wanted.keys() & saved.keys()
        if tuple(saved[n].shape) != tuple(wanted[n].shape)
    ]
    if problems:
        rows = "; ".join(sorted(problems))
        raise ValueError(f"the checkpoint {folder / str(step)} does not fit this run: {rows}")
    return jax.tree.unflatten(jax.tree.structure(like), [np.asarray(saved[n]) for n in wanted])


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _names(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, as "params.3.linear.kernel", in the order of the leaves."""
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): a
        for path, a in jax.tree.leaves_with_path(tree)
    }
