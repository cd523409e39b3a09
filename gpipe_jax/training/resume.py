"""Find and load the newest intact checkpoint of a run, or its cut; set damaged ones aside."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.manifest import Manifest, UnusableStep, rename_step, unusable
from gpipe_jax.config.loader import no_package
from gpipe_jax.config.run import Config
from gpipe_jax.distributed import processes
from gpipe_jax.errors import (
    CheckpointFormatError,
    ConfigError,
    DamagedCheckpointError,
    UnreadableCheckpointError,
)
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.utils.messages import say

if TYPE_CHECKING:
    from gpipe_jax.training.trainer import Trainer


class Restored(NamedTuple):
    """Hold a training state from a checkpoint."""

    state: TrainState
    manifest: Manifest
    skipped: tuple[UnusableStep, ...] = ()  # newer checkpoints

    @property
    def newer(self) -> frozenset[int]:
        """Return the steps of the newer checkpoints."""
        return frozenset(found.step for found in self.skipped)


def newest(
    folder: epath.Path,
    trainer: "Trainer",
    check: Callable[[Manifest], None],
    steps: list[int] | None = None,
) -> Restored | None:
    """Load the newest intact checkpoint; return None if there are no checkpoints.

    All processes load the same one.

    Args:
        folder: The checkpoints of a run.
        trainer: The trainer of this run.
        check: A function that may refuse a manifest, by raising an error.
        steps: The steps that may be loaded, the newest first. Default: all.

    Raises:
        ConfigError: All checkpoints are damaged, or the newest intact one does not fit.
        UnreadableCheckpointError: No checkpoint can be used, and some cannot be read now.
    """
    skipped: list[UnusableStep] = []
    for manifest in _manifests(folder, steps):
        state, problem = None, None
        if isinstance(manifest, UnusableStep):
            problem = manifest
        else:
            check(manifest)
            state, problem = _try(manifest, trainer)
        if processes.all_agree(problem is None):
            assert state is not None and isinstance(manifest, Manifest)
            if trainer.is_finite(state):
                return Restored(state, manifest, tuple(skipped))
            reason = "it holds NaN or infinity, and training from it would fail"
            problem = UnusableStep(manifest.step, reason, is_damaged=True)
        # If one host finds damage, all must know: the first host sets the checkpoint aside.
        is_damaged = not processes.all_agree(problem is None or not problem.is_damaged)
        reason = problem.reason if problem else "another host cannot use it"
        skipped.append(UnusableStep(manifest.step, reason, is_damaged))
    if skipped:
        raise _none_usable(folder, skipped)
    return None


def _none_usable(folder: epath.Path, skipped: list[UnusableStep]) -> Exception:
    lines = [f"step {found.step}: {found.reason}" for found in skipped]
    if not all(found.is_damaged for found in skipped):
        listed = "; ".join(lines)
        return UnreadableCheckpointError(
            f"no checkpoint in {folder} can be used, and some cannot be read now ({listed}); "
            f"repair the disk or the permissions, and run the same command again"
        )
    rule = "all checkpoints here are damaged; to start again, use another folder"
    return ConfigError([f"{rule} (train.workdir=...)", *lines], str(folder))


def _manifests(folder: epath.Path, steps: list[int] | None) -> Iterator[Manifest | UnusableStep]:
    try:
        # A network file system may list fewer files to some processes than to others.
        found = checkpoint_manifest.steps(folder) if steps is None else steps
        steps = processes.broadcast_from_first(found)
        yield from checkpoint_manifest.manifests(folder, steps)
    except CheckpointFormatError as error:
        raise ConfigError([str(error)], str(folder)) from error
    except ImportError as error:
        raise ConfigError([no_package(error)], str(folder)) from error


def _try(manifest: Manifest, trainer: "Trainer") -> tuple[TrainState | None, UnusableStep | None]:
    """Return the state, or why the checkpoint cannot be used."""
    descriptions = [str(layer) for layer in trainer.pipe.layers]
    try:
        saved = checkpoint_format.load(manifest, trainer.layer_shapes(), descriptions)
        return trainer.from_layers(saved, manifest.step), None
    except (DamagedCheckpointError, UnreadableCheckpointError) as error:
        return None, unusable(manifest.step, error)
    except ValueError as error:
        raise ConfigError([str(error)], str(manifest.path.parent)) from error


def describe(restored: Restored) -> list[str]:
    """Return one line for each checkpoint that was skipped."""
    folder = restored.manifest.path.parent.parent
    return [
        f"checkpoint {folder / str(found.step)} "
        f"{'is damaged' if found.is_damaged else 'cannot be used now'} ({found.reason}); "
        f"using that of step {restored.manifest.step}"
        for found in restored.skipped
    ]


def set_aside(restored: Restored) -> None:
    """Rename damaged checkpoints, because their steps will be saved again.

    Those that cannot be read now keep their names; see `Saver`.
    """
    folder = restored.manifest.path.parent.parent
    for found in restored.skipped:
        if found.is_damaged:
            try:
                rename_step(folder, found.step, "damaged")
            except OSError as error:
                name = folder / str(found.step)
                say(f"cannot rename the damaged {name} ({error.strerror or error})")


# --- the cut --------------------------------------------------------------------------------------


def measured_cut(config: Config, folder: epath.Path) -> list[int] | None:
    """Return the cut of the resumed run if it comes from measured times; else None.

    New measurements would differ, and might lead to another cut. The cut of another layout does not
    apply. All processes must call this.

    Args:
        config: The config of this run.
        folder: The checkpoints of a run.
    """
    if config.pipeline.cost != "time" or config.pipeline.partition != "auto":
        return None
    found = _stored_cut(config, folder) if processes.is_first() else []
    cut = processes.broadcast_from_first(found)
    if cut and processes.is_first():
        say(
            f"the stages begin at layers {cut}, as at the first start of this run "
            f"(pipeline.cost: time); set pipeline.partition for another cut"
        )
    return cut or None


def _stored_cut(config: Config, folder: epath.Path) -> list[int]:
    """Return the cut in the newest checkpoint, if it is of the same layout; else nothing."""
    last = None
    # Problems with checkpoints are reported when they are loaded.
    with contextlib.suppress(CheckpointFormatError, UnreadableCheckpointError, ImportError):
        found = checkpoint_manifest.manifests(folder)
        last = next((m for m in found if isinstance(m, Manifest)), None)
    if last is None:
        return []
    try:
        before = Config.model_validate(last.config)
    except ValueError:  # of another version, or none
        return []
    same_stages = before.mesh.stages == config.mesh.stages
    same_rest = before.model == config.model and before.pipeline == config.pipeline
    return (last.cut or []) if same_stages and same_rest else []
