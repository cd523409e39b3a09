"""Save a training state from Python, and load one that Python or a run has saved."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

from gpipe_jax.checkpoint import locate
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.manifest import CHECKPOINTS, RunInfo
from gpipe_jax.config.base import LARGEST
from gpipe_jax.distributed import processes
from gpipe_jax.errors import ArgumentError, ConfigError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.run_folder.folder import MARKER
from gpipe_jax.training import resume
from gpipe_jax.utils import paths
from gpipe_jax.utils.messages import say

if TYPE_CHECKING:
    from gpipe_jax.training.trainer import Trainer


def save(trainer: "Trainer", path: paths.AnyPath, current: TrainState) -> None:
    """Write a checkpoint; see `Trainer.save`."""
    from gpipe_jax.checkpoint.save import Saver  # Orbax takes two seconds

    place, step = paths.anywhere("path", path), current.step
    folder = place / CHECKPOINTS
    steps = _earlier(place, folder, step)
    if not trainer.is_finite(current):
        raise ArgumentError(
            "current", f"`current`, of step {step}, holds NaN or infinity, so it is not saved"
        )
    info = RunInfo(step, {}, metrics=None, cut=list(trainer.pipe.partition.boundaries))
    descriptions = [str(layer) for layer in trainer.pipe.layers]
    with (
        _replacing(folder, step if step in steps else None),
        contextlib.closing(Saver(folder, keep=LARGEST)) as saver,
    ):
        saver.save(trainer.to_layers(current), info, descriptions)
        saver.wait()


def _earlier(place: epath.Path, folder: epath.Path, step: int) -> list[int]:
    """Return the steps that are saved there; raise ArgumentError if `step` may not join them."""
    if (place / MARKER).exists():
        raise ArgumentError(
            "path",
            f"`path` {place} is the folder of a run of gpipe train, which resumes from its own "
            f"checkpoints; give another folder",
        )
    steps = checkpoint_manifest.steps(folder)
    if steps and steps[0] > step:
        raise ArgumentError(
            "path",
            f"`path` {place} has a checkpoint of step {steps[0]}, and this state is of step "
            f"{step}, so it would not be the newest there; give another folder, or remove {folder}",
        )
    return steps


@contextlib.contextmanager
def _replacing(folder: epath.Path, step: int | None) -> Iterator[None]:
    """Keep an older checkpoint of the step under another name until the block is done."""
    if step is None or not processes.is_first():
        yield
        return
    old = checkpoint_manifest.rename_step(folder, step, "replaced")
    try:
        yield
    except BaseException:
        if not (folder / str(step)).exists():
            old.rename(folder / str(step))
        raise
    old.rmtree()


def load(trainer: "Trainer", path: paths.AnyPath) -> TrainState:
    """Load the newest intact checkpoint; see `Trainer.load`."""
    found = locate.locate("path", path)
    try:
        restored = resume.newest(found.folder, trainer, lambda manifest: None, found.steps)
    except ConfigError as error:
        problems = "; ".join(error.problems)
        remedy = "gpipe.warm_start takes the parameters that fit"
        raise ArgumentError("path", f"`path` {path}: {problems}; {remedy}") from error
    assert restored is not None, "there are steps"
    for line in resume.describe(restored) if processes.is_first() else ():
        say(line)
    return restored.state
