"""Take the folder of a run, which `run.json` marks, and hold it while the run works there."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator

import pydantic
from etils import epath

from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint import reading
from gpipe_jax.config.loader import no_package
from gpipe_jax.distributed import processes
from gpipe_jax.errors import ConfigError, RunInUseError, UnreadableCheckpointError
from gpipe_jax.run_folder.claim import Claim, claimed
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.messages import say

MARKER, CONFIG, METRICS, LOCK = "run.json", "config.yaml", "metrics.jsonl", "lock"
CHECKPOINTS, CURVES = checkpoint_manifest.CHECKPOINTS, "curves.png"
# Everything that a run may write. In any other folder these belong to the user.
NAMES = (MARKER, CONFIG, METRICS, LOCK, CHECKPOINTS, CURVES)
NAMES += ("tensorboard", "profile", "wandb", "wandb_id")
PROGRAM = "gpipe-jax"


@dataclasses.dataclass(frozen=True)
class _Marker:
    """Describe the content of `run.json`."""

    program: str
    has_saved: bool = False  # whether the run has ever completed a checkpoint


_MARKER = pydantic.TypeAdapter(_Marker)


class RunFolder:
    """Hold the folder of a run; see `exclusive`. Only the first process does anything.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._has_saved = False
        self._claim: Claim | None = None

    def check(self) -> None:
        """Check, before anything is written, that no other run has taken the folder.

        Raises:
            RunInUseError: Another run has taken it, which can happen only without locks.
        """
        if self._claim is not None:
            self._claim.check()

    def note_saved(self) -> None:
        """Note that a checkpoint is complete: if it is missing later, the run must not restart."""
        if self._has_saved or not processes.is_first():
            return
        try:
            _mark(self.path, has_saved=True)
            self._has_saved = True
        except Exception as error:  # the checkpoint is complete; the next one tries again
            say(f"cannot write {self.path / MARKER}: {error}")

    def begin(self) -> None:
        """Begin a run at step 0, as there are no checkpoints; keep the metrics of an earlier run.

        Raises:
            ConfigError: An earlier run has saved checkpoints, which are missing now.
        """
        if not processes.is_first():
            return
        if self._has_saved:
            problem = (
                f"the run here has saved checkpoints, but {self.path / CHECKPOINTS} has none now; "
                f"mount or restore them, or use another folder (train.workdir=...); to start again "
                f"here, remove {self.path / MARKER}"
            )
            raise ConfigError([problem], str(self.path))
        metrics = self.path / METRICS
        if metrics.exists() and metrics.read_bytes():
            say(
                f"{self.path} has no checkpoint, so the run starts from step 0; the metrics of the "
                f"earlier run are kept in {keep_aside(metrics)}"
            )

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Lock the folder until the stack is left. Raises RunInUseError."""
        path = self.path / LOCK
        if atomic_files.is_local(path):
            # The file is not emptied, and a link is not followed: it may be the user's.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            with writing(self.path):
                file = stack.enter_context(os.fdopen(os.open(path, flags, 0o666), "r+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                problem = f"another run is using {self.path}; end it, or wait until it has ended"
                raise RunInUseError(
                    f"{problem}, or use another folder (train.workdir=...)"
                ) from error
            except OSError:
                pass  # a file system without locks
        with writing(self.path):
            self._claim = stack.enter_context(claimed(path))


@contextlib.contextmanager
def exclusive(workdir: epath.Path) -> Iterator[RunFolder]:
    """Make the folder of a run, or take that of an earlier one, and hold it.

    Two runs in one folder would write the same files. The first process holds a lock, which ends
    with the process; where there are no locks, as on gs://, it holds a claim.

    Raises:
        ConfigError: The folder cannot be made, or holds files that are not of a run.
        RunInUseError: Another run is using it.
    """
    with contextlib.ExitStack() as stack:
        folder = RunFolder(workdir)
        if processes.is_first():
            with writing(workdir):
                folder._has_saved = _take(workdir)
            folder._lock(stack)
            with writing(workdir):
                for name in (MARKER, CONFIG, METRICS, CURVES):
                    atomic_files.remove_drafts(workdir / name)
        processes.all_agree(True)  # the other processes wait for the folder
        yield folder


@contextlib.contextmanager
def writing(workdir: epath.Path) -> Iterator[None]:
    """Turn an error of the disk or the network into a ConfigError, with a remedy."""
    try:
        yield
    except (ConfigError, RunInUseError):
        raise
    except ImportError as error:  # of the client of a bucket
        raise ConfigError([no_package(error)], str(workdir)) from error
    except Exception as error:
        # The clients of buckets raise their own errors.
        if atomic_files.is_local(workdir) and not isinstance(error, OSError):
            raise
        problem = f"cannot write here ({error}); use another folder (train.workdir=...)"
        raise ConfigError([problem], str(workdir)) from error


def keep_aside(path: epath.Path) -> epath.Path:
    """Rename a file to a free name; return the new path."""
    new, count = path.with_name(f"{path.name}.kept"), 1
    while new.exists():
        new, count = path.with_name(f"{path.name}.kept-{count}"), count + 1
    path.rename(new)
    return new


# --- the owner of a folder ------------------------------------------------------------------------


def _take(workdir: epath.Path) -> bool:
    """Make and mark a folder; return whether a run has ever completed a checkpoint there.

    Raises:
        ConfigError: The folder does not belong to a run, and holds a file that a run would write.
    """
    marker = _read_marker(workdir / MARKER)
    if marker is not None:
        return marker.has_saved
    if not _is_of_an_earlier_version(workdir):
        others = [name for name in NAMES if _is_in_use(workdir / name)]
        if others:
            problem = (
                f"the folder does not belong to a run of gpipe train, and holds "
                f"{', '.join(others)}, which the run would replace; use another folder "
                f"(train.workdir=...)"
            )
            raise ConfigError([problem], str(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    _mark(workdir, has_saved=False)
    return False


def _mark(workdir: epath.Path, *, has_saved: bool) -> None:
    text = json.dumps(dataclasses.asdict(_Marker(PROGRAM, has_saved)))
    atomic_files.write_text(workdir / MARKER, text + "\n", durable=True)


def _read_marker(path: epath.Path) -> _Marker | None:
    """Return the marker, or None if the file is missing or not of this program."""
    if not path.is_file():
        return None
    try:
        marker = reading.parse(path.read_bytes(), _MARKER)
    except ValueError:
        return None
    return marker if marker.program == PROGRAM else None


def _is_of_an_earlier_version(workdir: epath.Path) -> bool:
    """Return whether a version without markers has run here.

    Such a run leaves checkpoints, or a lock and a config that names its folder.
    """
    with contextlib.suppress(UnreadableCheckpointError):
        checkpoints = workdir / CHECKPOINTS
        for step in checkpoint_manifest.steps(checkpoints):
            path = checkpoints / str(step) / checkpoint_manifest.STATE
            if (path / checkpoint_manifest.MANIFEST).exists():
                return True
    config = workdir / CONFIG
    if not config.is_file() or (atomic_files.is_local(workdir) and not (workdir / LOCK).is_file()):
        return False
    return bool(re.search(rb"^  workdir: (?!null)", config.read_bytes(), re.MULTILINE))


def _is_in_use(path: epath.Path) -> bool:
    """Return whether there is anything but an empty folder."""
    if not path.exists():
        return atomic_files.is_local(path) and os.path.islink(path)
    return not path.is_dir() or any(path.iterdir())
