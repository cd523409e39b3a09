"""Connect the processes of a run, end all of them if one dies, and share small values.

The connections of the `roll_call` stay open. If one breaks without a goodbye, its process died, and
the others exit too, so that a supervisor can start all of them again:

    process 1 --+
    process 2 --+--> process 0     "goodbye": done.  broken, or a reason: everybody exits.
    process 3 --+
"""

import contextlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

from gpipe_jax.distributed.cluster import TIMEOUT_S, Cluster
from gpipe_jax.distributed.roll_call import (
    HEARTBEAT_S,
    Peer,
    read_line,
    send_line,
    wait_for_all,
)
from gpipe_jax.utils.messages import finish_answer, say

GRACE_S = 5  # the time that others get to exit by themselves
SHUTDOWN_S = 45  # the wait at the end for others, which have finished or died
GOODBYE = "goodbye"


@contextlib.contextmanager
def connected(cluster: Cluster | None) -> Iterator[None]:
    """Run the block as one process of the cluster, or as a single process.

    Call it before any device is used. Raises MissingProcessError if a process does not connect in
    time.
    """
    if cluster is None or cluster.num_processes == 1:
        yield
        return
    peers = wait_for_all(cluster, TIMEOUT_S)
    watcher = FailureWatcher(cluster, peers)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_index,
        cluster_detection_method="deactivate",
        initialization_timeout=TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
    )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # The likely cause is that another process died: the watcher names it and ends this one.
        time.sleep(HEARTBEAT_S)
        watcher.report_failure(error)
        raise
    except BaseException as error:
        watcher.report_failure(error)
        raise
    watcher.finish()


def exit_now(code: int) -> NoReturn:
    """Exit with this code at once. JAX's own shutdown aborts if other processes have exited."""
    finish_answer()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class FailureWatcher:
    """End this process, with a message, when another one dies.

    Process 0 sees its connections break and informs the others. The others see that of process 0.
    """

    def __init__(self, cluster: Cluster, peers: list[Peer]) -> None:
        self.cluster, self.peers, self.is_done = cluster, peers, False
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Say goodbye, so that no process exits because of this one; wait for process 0."""
        for peer in self.peers:
            send_line(peer.socket, GOODBYE)
        if self.cluster.process_index:
            for thread in self._threads:
                thread.join()

    def report_failure(self, error: BaseException) -> None:
        """Send the error of this process, which exits with its own code, to the others."""
        self.is_done = True
        reason = next(iter(str(error).splitlines()[-1:]), "")
        for peer in self.peers:
            text = f"{self.cluster.label} failed: {type(error).__name__}: {reason}"
            send_line(peer.socket, text)

    def _listen(self, peer: Peer) -> None:
        try:
            message = read_line(peer.socket)
        except OSError:
            message = ""
        if message == GOODBYE:
            return
        if message:  # the same error may occur in this process, with its own exit code
            time.sleep(GRACE_S)
        if self.is_done:
            return
        host = f"host {peer.index + 1} of {self.cluster.num_processes} ({peer.name})"
        reason = message or f"{host} has disconnected"
        for other in self.peers:
            send_line(other.socket, reason)
        say(f"{reason}; {self.cluster.label} exits too: start all of them again to continue")
        os._exit(1)


def is_first() -> bool:
    """Return whether this is process 0, which writes the files that all share."""
    return jax.process_index() == 0


def broadcast_from_first(numbers: list[int]) -> list[int]:
    """Return the numbers of process 0 in every process."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    # Only process 0's values count; the others' need the same shape.
    values = np.resize(np.asarray(numbers, np.int32), count)
    return multihost_utils.broadcast_one_to_all(values).tolist() if count else []


def same_in_all(text: str) -> bool:
    """Return whether a text is the same in all processes; every one must call this."""
    checksum = zlib.crc32(text.encode()) & 0x7FFFFFFF
    return all_agree(broadcast_from_first([checksum]) == [checksum])


def close_in_all(values: np.ndarray, tolerance: np.ndarray) -> bool:
    """Return whether float32 numbers are those of process 0 within a tolerance, in all processes.

    Every process must call this, with an array of the same shape.
    """
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    of_first = np.asarray(multihost_utils.broadcast_one_to_all(values))
    return all_agree(bool(np.all(np.abs(of_first - values) <= tolerance)))


def all_agree(yes: bool) -> bool:
    """Return whether `yes` is true in all processes; every one must call this."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())
