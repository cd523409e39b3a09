"""Connect the processes of a run, end all of them if one dies, and share small values.

JAX aborts without naming the processes that are missing. So before JAX connects them, all processes
connect to the coordinator's port, and process 0 reports which ones are missing. The connections
stay open. If one breaks without a goodbye, its process died, and the others exit too, so that a
supervisor can start all of them again:

    process 1 --+
    process 2 --+--> process 0     "goodbye": done.  broken, or a reason: everybody exits.
    process 3 --+
"""

import contextlib
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from gpipe_jax.distributed.cluster import TIMEOUT_S, Cluster
from gpipe_jax.errors import MissingProcessError
from gpipe_jax.utils.messages import say

GRACE_S = 5  # the time that others get to exit by themselves
SHUTDOWN_S = 45  # the wait at the end for others, which have finished or died
HEARTBEAT_S = 30  # without a heartbeat a host counts as dead; JAX's own limit is 100 s
GOODBYE, READY = b"goodbye\n", b"ready\n"


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Peer(NamedTuple):
    """Hold a connection to another process."""

    index: int
    name: str  # the name of its machine
    socket: socket.socket


def wait_for_all(cluster: Cluster, timeout_s: float) -> list[Peer]:
    """Wait for all processes; raise MissingProcessError with the names of missing ones."""
    deadline = time.monotonic() + timeout_s
    hint = "did you start the same command on every host (--worker=all)?"
    if cluster.process_index:
        say(f"{cluster.label}, waiting for the others (time-out {timeout_s:g} s); {hint}")
        return [_connect(cluster, deadline, hint)]
    peers: dict[int, Peer] = {}
    with _server(cluster) as server:
        last_message = 0.0
        while len(peers) < cluster.num_processes - 1:
            missing = [i for i in range(1, cluster.num_processes) if i not in peers]
            noun = "hosts" if len(missing) > 1 else "host"
            names = f"{noun} {', '.join(str(i + 1) for i in missing)}"
            if time.monotonic() > deadline:
                problem = (
                    f"{names} of {cluster.num_processes} did not connect within {timeout_s:g} s; "
                    f"{hint}"
                )
                for peer in peers.values():
                    with contextlib.suppress(OSError):  # it has exited
                        peer.socket.sendall(f"{problem}\n".encode())
                raise MissingProcessError(problem)
            if time.monotonic() - last_message > 30:
                say(f"{cluster.label}, waiting for {names} (time-out {timeout_s:g} s); {hint}")
                last_message = time.monotonic()
            server.settimeout(1)
            # There is no connection yet, or it belongs to another run.
            with contextlib.suppress(OSError, ValueError):
                peer = _accept(server.accept()[0])
                if 0 < peer.index < cluster.num_processes:
                    peers[peer.index] = peer
    for peer in peers.values():
        with contextlib.suppress(OSError):  # the watcher sees the broken connection
            peer.socket.sendall(READY)
    return list(peers.values())


def _server(cluster: Cluster) -> socket.socket:
    port = int(cluster.coordinator.rpartition(":")[2])
    options: Any = {}
    if socket.has_dualstack_ipv6():
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        return socket.create_server(("", port), backlog=cluster.num_processes, **options)
    except OSError as error:
        raise MissingProcessError(
            f"port {port} of the coordinator {cluster.coordinator} cannot be opened on this host "
            f"({error.strerror}); use another port, the same on every host"
        ) from error


def _accept(connection: socket.socket) -> Peer:
    connection.settimeout(10)
    index, name = _line(connection).decode().split(" ", 1)
    return Peer(int(index), name.strip(), _kept_alive(connection))


def _connect(cluster: Cluster, deadline: float, hint: str) -> Peer:
    host, _, port = cluster.coordinator.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall(f"{cluster.process_index} {socket.gethostname()}\n".encode())
            connection.settimeout(max(deadline + 5 - time.monotonic(), 1))
            answer = _line(connection)
        except OSError:  # process 0 does not listen yet
            answer = b""
        if answer == READY:
            return Peer(0, host, _kept_alive(connection))
        if answer:
            raise MissingProcessError(answer.decode().strip())
        if time.monotonic() > deadline:
            raise MissingProcessError(
                f"host 1 of {cluster.num_processes} ({cluster.coordinator}) did not answer; {hint}"
            )
        time.sleep(0.5)


def _line(connection: socket.socket) -> bytes:
    """Read up to the end of a line, or of the connection."""
    text = b""
    while not text.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            break
        text += more
    return text


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Return the connection, such that it breaks if the other machine dies."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("IDLE", HEARTBEAT_S // 2), ("INTVL", 5), ("CNT", HEARTBEAT_S // 10)):
        if hasattr(socket, f"TCP_KEEP{name}"):  # some systems lack it
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"), value)
    return connection


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
            with contextlib.suppress(OSError):
                peer.socket.sendall(GOODBYE)
        if self.cluster.process_index:
            for thread in self._threads:
                thread.join()

    def report_failure(self, error: BaseException) -> None:
        """Send the error of this process, which exits with its own code, to the others."""
        self.is_done = True
        reason = next(iter(str(error).splitlines()[-1:]), "")
        text = f"{self.cluster.label} failed: {type(error).__name__}: {reason}\n"
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.sendall(text.encode())

    def _listen(self, peer: Peer) -> None:
        try:
            message = _line(peer.socket)
        except OSError:
            message = b""
        if message == GOODBYE:
            return
        if message:  # the same error may occur in this process, with its own exit code
            time.sleep(GRACE_S)
        if self.is_done:
            return
        reason = message.decode().strip()
        if not reason:
            host = f"host {peer.index + 1} of {self.cluster.num_processes} ({peer.name})"
            reason = f"{host} has disconnected"
        for other in self.peers:
            with contextlib.suppress(OSError):
                other.socket.sendall(f"{reason}\n".encode())
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


def all_agree(yes: bool) -> bool:
    """Return whether `yes` is true in all processes; every one must call this."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())
