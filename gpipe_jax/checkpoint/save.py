"""Writing checkpoints while training goes on; Orbax's types stay in this file.

Orbax gives the background thread, the barriers between processes, the temporary folder that gets
its name only when everything is in it, and the removal of old checkpoints. The files are those of
`checkpoint`: Orbax's own have no checksums.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from gpipe_jax.checkpoint import format
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.errors import SaveError

WRITERS = 4  # files that a process writes at once


@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    state: LayerTrees
    descriptions: Sequence[str]
    about: Mapping[str, Any]


class _Files(ocp.AsyncCheckpointHandler):
    """Every process writes its layers, then what it wrote; the first one makes the manifest."""

    def __init__(self) -> None:
        self._about: Mapping[str, Any] = {}
        self._layers = 0

    async def async_save(self, directory: epath.Path, args: _Save) -> list[future.Future]:
        self._about, self._layers = args.about, len(args.descriptions)
        write = asyncio.to_thread(_write, directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write, name="layers")]

    def save(self, directory: epath.Path, args: _Save) -> None:
        _write(directory, args)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        raise NotImplementedError("see `checkpoint.load`")

    def finalize(self, directory: epath.Path) -> None:
        """Called in the first process, when all have written."""
        paths = sorted(directory.glob("process_*.json"))
        if len(paths) != jax.process_count():
            raise OSError(f"{len(paths)} of {jax.process_count()} processes wrote their layers")
        parts = _all_parts([json.loads(path.read_text()) for path in paths], self._layers)
        for path in paths:
            path.unlink()
        format.write_manifest(directory, parts, self._about)


ocp.args.register_with_handler(_Files, for_save=True, for_restore=True)(_Save)


def _all_parts(written: Sequence[Mapping[str, dict]], layers: int) -> dict[str, dict]:
    """The parts that the processes wrote; OSError unless each layer is there, and once."""
    found = sorted(part for one in written for part in one)
    wanted = sorted([format.COMMON, *map(str, range(layers))])
    if found != wanted:
        raise OSError(f"the processes wrote {found}, not each of {wanted} once")
    return {part: entry for one in written for part, entry in one.items()}


def _write(directory: epath.Path, args: _Save) -> None:
    here = jax.process_index()

    def one(i: int) -> tuple[str, dict]:
        tree = args.state.layers[i]
        return str(i), format.write_part(directory, str(i), tree, args.descriptions[i])

    with ThreadPoolExecutor(WRITERS) as pool:
        parts = dict(pool.map(one, args.state.layers))
    if here == 0:
        common = format.write_part(directory, format.COMMON, args.state.common)
        parts[format.COMMON] = common
    (directory / f"process_{here}.json").write_text(json.dumps(parts))


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs what it raises too, as a traceback, and what it thinks of its settings."""
    return "orbax" not in record.pathname


class Saver:
    """The checkpoints that a run writes into `folder`.

    The newest `keep` are kept, and the `keep_best` of the lowest held-out loss.
    """

    def __init__(self, folder: epath.Path, *, keep: int, keep_best: int = 0) -> None:
        logging.getLogger("absl").addFilter(_is_not_orbax)
        self.folder = folder
        self._keep, self._keep_best = keep, keep_best
        self._losses: dict[int, float] = {}
        for found in format.manifests(folder) if keep_best else ():
            if isinstance(found, format.Manifest):
                self.note(found.step, found.metrics)
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=self,
            save_root_metadata=False,
            lightweight_initialize=True,
        )
        handlers = {format.STATE: _Files()}
        self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question; the checkpoints come in the order of their steps."""
        steps = [one.step for one in checkpoints]
        known = [step for step in steps if step in self._losses]
        best = sorted(known, key=self._losses.__getitem__)[: self._keep_best]
        return [step in steps[-self._keep :] or step in best for step in steps]

    def note(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """What an evaluation at a step came to, which `keep_best` goes by."""
        if metrics and "test_loss" in metrics:
            self._losses[step] = metrics["test_loss"]

    def save(
        self,
        state: LayerTrees,
        step: int,
        *,
        descriptions: Sequence[str],
        config: dict,
        metrics: dict[str, float] | None,
        data: dict,
    ) -> None:
        """Begin to write; `state` must not change. Waits for the checkpoint before to be written.

        Raises SaveError for what went wrong with that one, or goes wrong now.
        """
        self.note(step, metrics)
        about = {"step": step, "config": config, "metrics": metrics, "data": data}
        args = ocp.args.Composite(**{format.STATE: _Save(state, descriptions, about)})
        with _files_may_fail(self.folder):
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Return when everything is written. Raises SaveError."""
        with _files_may_fail(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop. Raises SaveError."""
        with _files_may_fail(self.folder):
            self._manager.close()


@contextlib.contextmanager
def _files_may_fail(folder: epath.Path) -> Iterator[None]:
    """Turns what can go wrong with files into a SaveError, and removes what is half written."""
    try:
        yield
    except OSError as error:
        if jax.process_index() == 0:
            for path in folder.glob("*.orbax-checkpoint-tmp*"):
                path.rmtree()
        remedy = "the checkpoints before it are as they were"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free space there, or lower train.keep; {remedy}"
        reason = error.strerror or error
        raise SaveError(f"cannot save into {folder}: {reason}; {remedy}") from error
