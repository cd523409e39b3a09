"""Write checkpoints in the background of training; only this file uses Orbax's types.

Orbax contributes the background thread, the barriers between processes and the removal of old
checkpoints. It also writes into a temporary folder, which gets its name when it is complete. The
files are those of `checkpoint.format`, because Orbax's own files have no checksums.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.checkpoint.manifest import Manifest, RunInfo
from gpipe_jax.errors import CheckpointFormatError, SaveError, UnreadableCheckpointError
from gpipe_jax.utils.atomic_files import is_local
from gpipe_jax.utils.messages import say

WRITERS = 4  # files that a process writes at the same time
RETRY_S = 1  # the pause before a file is written again after an error
FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors that remain a second later.
LASTING = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


@dataclasses.dataclass
class _SaveArguments(ocp.args.CheckpointArgs):
    state: LayerTrees
    descriptions: Sequence[str]
    info: RunInfo


class _LayerFiles(ocp.AsyncCheckpointHandler):
    """Write a process's layers and a list of them; the first process then writes the manifest."""

    def __init__(self) -> None:
        self._info: RunInfo | None = None
        self._num_layers = 0

    async def async_save(self, directory: epath.Path, args: _SaveArguments) -> list[future.Future]:
        self._info, self._num_layers = args.info, len(args.descriptions)
        write = asyncio.to_thread(_write, directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write, name="layers")]

    def save(self, directory: epath.Path, args: _SaveArguments) -> None:
        _write(directory, args)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        raise NotImplementedError("use `checkpoint.format.load`")

    def finalize(self, directory: epath.Path) -> None:
        """Write the manifest; Orbax calls this in the first process when all have written."""
        paths = sorted(directory.glob("process_*.json"))
        if len(paths) != jax.process_count():
            raise OSError(f"{len(paths)} of {jax.process_count()} processes wrote their layers")
        files = _all_files([json.loads(path.read_text()) for path in paths], self._num_layers)
        for path in paths:
            path.unlink()
        assert self._info is not None, "async_save comes first"
        checkpoint_manifest.write_manifest(directory, files, self._info)


ocp.args.register_with_handler(_LayerFiles, for_save=True, for_restore=True)(_SaveArguments)


def _all_files(by_process: Sequence[Mapping[str, dict]], num_layers: int) -> dict[str, dict]:
    """Return the files of all processes; OSError unless each layer was written exactly once."""
    written = sorted(name for files in by_process for name in files)
    expected = sorted([checkpoint_manifest.COMMON, *map(str, range(num_layers))])
    if written != expected:
        raise OSError(f"the processes wrote {written}, not each of {expected} once")
    return {name: entry for files in by_process for name, entry in files.items()}


def _write(directory: epath.Path, args: _SaveArguments) -> None:
    process = jax.process_index()

    def write_layer(i: int) -> tuple[str, dict]:
        tree, description = args.state.layers[i], args.descriptions[i]
        return str(i), _write_file(directory, str(i), tree, description)

    with ThreadPoolExecutor(WRITERS) as pool:
        files = dict(pool.map(write_layer, args.state.layers))
    if process == 0:
        common = checkpoint_manifest.COMMON
        files[common] = _write_file(directory, common, args.state.common)
    (directory / f"process_{process}.json").write_text(json.dumps(files))


def _write_file(directory: epath.Path, name: str, tree: Any, description: str = "") -> dict:
    """Write a file; if that fails for a temporary reason, try once more."""
    try:
        return checkpoint_format.write_file(directory, name, tree, description)
    except OSError as error:
        if error.errno in LASTING:
            raise
        say(f"cannot write {directory / name} ({error.strerror or error}); trying once more")
        time.sleep(RETRY_S)
        return checkpoint_format.write_file(directory, name, tree, description)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Return whether a log record is not Orbax's, which also logs each error that it raises."""
    return "orbax" not in record.pathname


class _StepNames(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
    """Tell Orbax which checkpoints exist; its own rules also accept `0050` and other digits."""

    def __init__(self, hidden: Collection[int]) -> None:
        self._hidden = hidden

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        folder = epath.Path(base_path)
        for step in checkpoint_manifest.steps(folder):
            if step not in self._hidden:
                yield ocp.path.step.Metadata(step=step, path=folder / self.build_name(step))

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"there is no checkpoint of step {step} in {base_path}")


class Saver:
    """Write a run's checkpoints into `folder`, and remove old ones.

    The newest `keep` checkpoints are kept, and the `keep_best` ones of the lowest held-out loss.
    Those of the steps `unusable` are neither counted nor removed. When such a step is saved again,
    the old one is renamed.
    """

    def __init__(
        self,
        folder: epath.Path,
        *,
        keep: int,
        keep_best: int = 0,
        unusable: Collection[int] = (),
    ) -> None:
        logging.getLogger("absl").addFilter(_is_not_orbax)
        self.folder, self._unusable = folder, set(unusable)
        self._keep, self._keep_best = keep, keep_best
        self._losses: dict[int, float] = {}
        if keep_best:
            self._note_earlier()
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=self,
            save_root_metadata=False,
            lightweight_initialize=True,
            step_name_format=_StepNames(self._unusable),
        )
        handlers = {checkpoint_manifest.STATE: _LayerFiles()}
        with _os_errors_are_save_errors(folder):
            self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def _note_earlier(self) -> None:
        """Note the evaluations of the existing checkpoints, as far as they can be read."""
        with contextlib.suppress(CheckpointFormatError, UnreadableCheckpointError):
            for manifest in checkpoint_manifest.manifests(self.folder):
                if isinstance(manifest, Manifest):
                    self.note(manifest.step, manifest.metrics)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Answer Orbax, for each of the checkpoints in the order of their steps."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        known = [step for step in steps if step in self._losses]
        best = sorted(known, key=self._losses.__getitem__)[: self._keep_best]
        return [step in steps[-self._keep :] or step in best for step in steps]

    def note(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Note the evaluation at a step, which `keep_best` goes by."""
        if metrics and "test_loss" in metrics:
            self._losses[step] = metrics["test_loss"]

    def save(self, state: LayerTrees, info: RunInfo, descriptions: Sequence[str]) -> None:
        """Begin to write a checkpoint, after the one before it is written.

        Args:
            state: The layers of this process. It must not change until the files are written.
            info: The run and the step.
            descriptions: `str(layer)` of all layers.

        Raises:
            SaveError: This checkpoint, or the one before it, could not be written.
        """
        self.note(info.step, info.metrics)
        arguments = _SaveArguments(state, descriptions, info)
        composite = ocp.args.Composite(**{checkpoint_manifest.STATE: arguments})
        with _os_errors_are_save_errors(self.folder):
            self._make_way(info.step)
            self._manager.save(info.step, args=composite, force=True)

    def _make_way(self, step: int) -> None:
        """Rename an unusable checkpoint of a step that is about to be saved."""
        if step not in self._unusable:
            return
        if jax.process_index() == 0 and step in checkpoint_manifest.steps(self.folder):
            checkpoint_manifest.rename_step(self.folder, step, "unreadable")
        self._unusable.discard(step)

    def wait(self) -> None:
        """Wait until everything is written. Raises SaveError."""
        with _os_errors_are_save_errors(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then stop the background thread. Raises SaveError."""
        with _os_errors_are_save_errors(self.folder):
            self._manager.close()


@contextlib.contextmanager
def _os_errors_are_save_errors(folder: epath.Path) -> Iterator[None]:
    """Turn an error of the disk or the network into a SaveError, and remove half-written files."""
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        # The clients of buckets raise their own errors.
        if is_local(folder) and not isinstance(error, OSError):
            raise
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # it fails too
                for path in folder.glob("*.orbax-checkpoint-tmp*"):
                    path.rmtree()
        number = error.errno if isinstance(error, OSError) else None
        remedy = "earlier checkpoints are unchanged"
        if number in FULL:
            remedy = f"free space there, or lower train.keep; {remedy}"
        reason = getattr(error, "strerror", None) or error
        raise SaveError(f"cannot save into {folder}: {reason}; {remedy}") from error
