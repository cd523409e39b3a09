"""Find and load the newest intact checkpoint of a run, and set damaged ones aside."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint.format import DamagedStep, Manifest
from gpipe_jax.config.loader import no_package
from gpipe_jax.distributed import processes
from gpipe_jax.errors import CheckpointFormatError, ConfigError, DamagedCheckpointError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.training.trainer import Trainer


class Restored(NamedTuple):
    """Hold a training state from a checkpoint."""

    state: TrainState
    manifest: Manifest
    damaged: dict[int, str]  # newer steps whose checkpoints are damaged: the reason of each


def newest(
    folder: epath.Path, trainer: Trainer, check: Callable[[Manifest], None]
) -> Restored | None:
    """Load the newest intact checkpoint; return None if there are no checkpoints.

    All processes load the same one.

    Args:
        folder: The checkpoints of a run.
        trainer: The trainer of this run.
        check: A function that may refuse a manifest, by raising an error.

    Raises:
        ConfigError: All checkpoints are damaged, or the newest intact one does not fit.
    """
    damaged: dict[int, str] = {}
    for manifest in _manifests(folder):
        state, problem = None, None
        if isinstance(manifest, DamagedStep):
            problem = manifest.reason
        else:
            check(manifest)
            state, problem = _try(manifest, trainer)
        if processes.all_agree(problem is None):
            assert state is not None and isinstance(manifest, Manifest)
            return Restored(state, manifest, damaged)
        damaged[manifest.step] = problem or "another host found it damaged"
    if damaged:
        lines = [f"step {step}: {problem}" for step, problem in damaged.items()]
        rule = "all checkpoints here are damaged; to start again, remove or rename the folder"
        raise ConfigError([rule, *lines], str(folder))
    return None


def _manifests(folder: epath.Path) -> Iterator[Manifest | DamagedStep]:
    try:
        # A network file system may list fewer files to some processes than to others.
        steps = processes.broadcast_from_first(checkpoint_format.steps(folder))
        yield from checkpoint_format.manifests(folder, steps)
    except CheckpointFormatError as error:
        raise ConfigError([str(error)], str(folder)) from error
    except ImportError as error:
        raise ConfigError([no_package(error)], str(folder)) from error


def _try(manifest: Manifest, trainer: Trainer) -> tuple[TrainState | None, str | None]:
    """Return the state, or why the checkpoint is damaged."""
    descriptions = [str(layer) for layer in trainer.pipe.layers]
    try:
        saved = checkpoint_format.load(manifest, trainer.layer_shapes(), descriptions)
        return trainer.from_layers(saved, manifest.step), None
    except DamagedCheckpointError as error:
        return None, str(error)
    except ValueError as error:
        raise ConfigError([str(error)], str(manifest.path.parent)) from error


def describe(restored: Restored) -> list[str]:
    """Return one line for each checkpoint that was skipped."""
    folder = restored.manifest.path.parent.parent
    return [
        f"checkpoint {folder / str(step)} is damaged ({problem}); taking that of step "
        f"{restored.manifest.step}"
        for step, problem in restored.damaged.items()
    ]


def set_aside(restored: Restored) -> None:
    """Rename damaged checkpoints, because their steps will be saved again."""
    folder = restored.manifest.path.parent.parent
    for step in restored.damaged:
        new, count = folder / f"{step}.damaged", 1
        while new.exists():
            new, count = folder / f"{step}.damaged-{count}", count + 1
        (folder / str(step)).rename(new)
