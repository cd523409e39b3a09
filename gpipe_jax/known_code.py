"""Remember which code from files this user has run on this machine, by the hash of its content.

So a folder of a run that somebody else has made runs no code unasked; see
`gpipe_jax.config.trusted_code` and `nas.pickles.setup`. A folder may be moved, and a changed file
is asked for again.
"""

import contextlib
import hashlib
import os
from pathlib import Path


def remember(code: bytes | None) -> None:
    """Note that this user has run this code; without a place for notes, do nothing."""
    if code is not None:
        with contextlib.suppress(OSError, RuntimeError):
            note = _note(code)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def is_known(code: bytes) -> bool:
    """Return whether this user has run this code before on this machine."""
    with contextlib.suppress(OSError, RuntimeError):
        return _note(code).exists()
    return False


def _note(code: bytes) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "gpipe-jax" / "trusted_code" / hashlib.sha256(code).hexdigest()
