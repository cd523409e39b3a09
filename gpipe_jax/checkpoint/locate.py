"""Find the checkpoints that a path of the user's means: a run, a saved state, or one checkpoint."""

from typing import NamedTuple

from etils import epath

from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.manifest import CHECKPOINTS, STATE
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths


class CheckpointSteps(NamedTuple):
    """Hold a folder of checkpoints, and which of them are meant."""

    folder: epath.Path
    steps: list[int]  # the newest first


def locate(argument: str, path: paths.AnyPath) -> CheckpointSteps:
    """Return the checkpoints that a path means.

    Args:
        argument: The name of the argument or setting, for messages.
        path: The folder of a run, a folder of `Trainer.save`, or one checkpoint in either:
            `runs/digits` or `runs/digits/checkpoints/300`.

    Raises:
        ArgumentError: There is no checkpoint.
        UnreadableCheckpointError: The folder cannot be read.
    """
    place = paths.anywhere(argument, path)
    if place.name.isdigit() and (place / STATE).is_dir():
        return CheckpointSteps(place.parent, [int(place.name)])
    for folder in (place / CHECKPOINTS, place):
        if steps := checkpoint_manifest.steps(folder):
            return CheckpointSteps(folder, steps)
    reason = "has no checkpoint" if place.exists() else "does not exist"
    raise ArgumentError(
        argument,
        f"`{argument}` {path} {reason}; give the folder of a run, a folder that trainer.save has "
        f"written, or one checkpoint there (runs/digits/checkpoints/300)",
    )
