"""The newest whole checkpoint of a run, and what became of newer ones."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from gpipe_jax import errors
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint.format import DamagedStep, Manifest
from gpipe_jax.config.loader import no_package
from gpipe_jax.distributed import processes
from gpipe_jax.errors import ConfigError, DamagedCheckpointError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.training.trainer import Trainer


class Restored(NamedTuple):
    """A training state from a checkpoint."""

    state: TrainState
    manifest: Manifest
    damaged: dict[int, str]  # newer steps that are not whole, and why


def newest(
    folder: epath.Path, trainer: Trainer, check: Callable[[Manifest], None]
) -> Restored | None:
    """The state in the newest whole checkpoint; None if there has never been one.

    `check` may refuse a manifest. With several processes all of them take the same one. Raises
    ConfigError if checkpoints are there, but none that is whole, or it does not fit.
    """
    damaged: dict[int, str] = {}
    for found in _manifests(folder):
        state, problem = None, None
        if isinstance(found, Manifest):
            check(found)
            state, problem = _try(found, trainer)
        else:
            problem = found.reason
        if processes.all_agree(problem is None):
            assert state is not None and isinstance(found, Manifest)
            return Restored(state, found, damaged)
        damaged[found.step] = problem or "another host found it damaged"
    if damaged:
        lines = [f"step {step}: {problem}" for step, problem in damaged.items()]
        rule = "none of the checkpoints here is whole; to start anew, remove or rename the folder"
        raise ConfigError([rule, *lines], str(folder))
    return None


def _manifests(folder: epath.Path) -> Iterator[Manifest | DamagedStep]:
    try:
        # A network file system may list less to some processes than to others.
        steps = processes.from_first(checkpoint_format.steps(folder))
        yield from checkpoint_format.manifests(folder, steps)
    except errors.CheckpointFormatError as error:
        raise ConfigError([str(error)], str(folder)) from error
    except ImportError as error:
        problem = no_package(error)
        raise ConfigError([problem], str(folder)) from error


def _try(manifest: Manifest, trainer: Trainer) -> tuple[TrainState | None, str | None]:
    descriptions = [str(layer) for layer in trainer.pipe.layers]
    try:
        saved = checkpoint_format.load(manifest, trainer.layer_shapes(), descriptions)
        return trainer.from_layers(saved, manifest.step), None
    except DamagedCheckpointError as error:
        return None, str(error)
    except ValueError as error:
        raise ConfigError([str(error)], str(manifest.path.parent)) from error


def describe(restored: Restored) -> list[str]:
    """One line for each checkpoint that was passed over."""
    folder = restored.manifest.path.parent.parent
    return [
        f"checkpoint {folder / str(step)} is damaged ({problem}); taking that of step "
        f"{restored.manifest.step}"
        for step, problem in restored.damaged.items()
    ]


def set_aside(restored: Restored) -> None:
    """Rename damaged checkpoints, whose steps will be saved again."""
    folder = restored.manifest.path.parent.parent
    for step in restored.damaged:
        new, count = folder / f"{step}.damaged", 1
        while new.exists():
            new, count = folder / f"{step}.damaged-{count}", count + 1
        (folder / str(step)).rename(new)
