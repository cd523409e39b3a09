"""Claim a folder where there are no locks, such as one in a bucket, by an object that is renewed.

    take      If an object exists, watch it for `LEASE_S`; if it changes, another run is alive: give
              up. Then write an own token, wait `SETTLE_S`, and read: the last writer has the claim.
    hold      A thread renews the object every `RENEW_S`; it never replaces another run's token.
    check     Before anything is written, read: another run's token ends this run.

No clocks are compared. If the network fails for more than `LEASE_S`, another run may take the
claim. This run notices that at its next check, so both may write between that check and the one
before.
"""

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from gpipe_jax.errors import RunInUseError
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.messages import say

RENEW_S = 15.0
LEASE_S = 60.0  # if an object has not changed for so long, its run has died
SETTLE_S = 3.0  # longer than a write takes


class Claim:
    """Hold a claim; see `claimed`."""

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._token = f"{secrets.token_hex(8)} {socket.gethostname()}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def take(self) -> None:
        """Take the claim, and begin to renew it. Raises RunInUseError."""
        before = _read(self.path)
        if before is not None:
            say(
                f"{self.path} belongs to a run that was killed or is still working; waiting up to "
                f"{LEASE_S:g} s to find out"
            )
            if _changes(self.path, before):
                raise self._in_use()
        self._write()
        time.sleep(SETTLE_S)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raise RunInUseError if another run has taken the claim."""
        try:
            is_mine = self._is_mine()
        except Exception:  # of the network: the next write fails too, and says why
            return
        if not is_mine:
            raise self._in_use()

    def release(self) -> None:
        """Stop renewing; remove the object unless it is another run's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Exception):  # the next run waits for `LEASE_S`
            if self._is_mine():
                self.path.unlink()

    def _in_use(self) -> RunInUseError:
        return RunInUseError(
            f"another run is using {self.path.parent} (see {self.path}); end it, or wait until it "
            f"has ended, or use another folder (train.workdir=...)"
        )

    def _is_mine(self) -> bool:
        """Return whether no other run has the claim; someone may have removed the object."""
        text = _read(self.path)
        return text is None or text.startswith(self._token)

    def _write(self) -> None:
        atomic_files.write_text(self.path, f"{self._token} {time.time():.3f}\n")

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(Exception):  # of the network; the next time may succeed
                if not self._is_mine():
                    return
                self._write()


def _read(path: epath.Path) -> str | None:
    """Return the content of the object; None if it is missing, or empty like a lock file."""
    try:
        return path.read_bytes().decode(errors="replace") or None
    except FileNotFoundError:
        return None


def _changes(path: epath.Path, before: str) -> bool:
    """Return whether another run renews its claim; if it removes the claim, it has ended."""
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(LEASE_S / 20)
        now = _read(path)
        if now != before:
            return now is not None
    return False


@contextlib.contextmanager
def claimed(path: epath.Path) -> Iterator[Claim]:
    """Hold the claim `path` while the block runs.

    Raises:
        RunInUseError: Another run holds it.
    """
    claim = Claim(path)
    try:
        claim.take()
        yield claim
    finally:
        claim.release()
