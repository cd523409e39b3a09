"""Several processes as one run: whether all have come, whether one is gone, what all agree on.

Before JAX connects them, and aborts without a word of who is missing, the processes hold a roll
call on the coordinator's port. They keep its connections: one that breaks without a goodbye is a
process that died, and the others end too, so that a supervisor can start them all again.
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
from gpipe_jax.utils.console import say

GRACE_S = 5  # for the others to end by themselves
SHUTDOWN_S = 45  # to wait at the end for others, who have said goodbye or are gone
HEARTBEAT_S = 30  # without a sign of life a host counts as gone; JAX's own limit is 100 s
GOODBYE, READY = b"goodbye\n", b"ready\n"


@contextlib.contextmanager
def together(cluster: Cluster | None) -> Iterator[None]:
    """Run the block as one of the cluster's processes, or alone. Before any device is touched.

    Raises MissingError if not all come in time.
    """
    if cluster is None or cluster.count == 1:
        yield
        return
    peers = roll_call(cluster, TIMEOUT_S)
    watch = Watch(cluster, peers)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.count,
        cluster.index,
        cluster_detection_method="deactivate",
        initialization_timeout=TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_S,
    )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # The likely reason, a process that is gone, says its name and ends this one.
        time.sleep(HEARTBEAT_S)
        watch.failed(error)
        raise
    except BaseException as error:
        watch.failed(error)
        raise
    watch.goodbye()


def leave(code: int) -> NoReturn:
    """End with this exit code. JAX's own farewell aborts where others have ended before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Peer(NamedTuple):
    """A connection to another process."""

    index: int
    name: str  # of its machine
    socket: socket.socket


def roll_call(cluster: Cluster, timeout_s: float) -> list[Peer]:
    """Wait for all processes. Raises MissingError, which names those that are not here."""
    deadline = time.monotonic() + timeout_s
    hint = "did you start the same command on every host (--worker=all)?"
    if cluster.index:
        say(f"{cluster.me}, waiting for the others (time-out {timeout_s:g} s); {hint}")
        return [_answer(cluster, deadline, hint)]
    here: dict[int, Peer] = {}
    with _server(cluster) as server:
        said = 0.0
        while len(here) < cluster.count - 1:
            missing = [i for i in range(1, cluster.count) if i not in here]
            names = f"host{'s' * (len(missing) > 1)} {', '.join(str(i + 1) for i in missing)}"
            if time.monotonic() > deadline:
                problem = f"{names} of {cluster.count} did not come within {timeout_s:g} s; {hint}"
                for peer in here.values():
                    with contextlib.suppress(OSError):  # it has gone again
                        peer.socket.sendall(f"{problem}\n".encode())
                raise MissingProcessError(problem)
            if time.monotonic() - said > 30:
                say(f"{cluster.me}, waiting for {names} (time-out {timeout_s:g} s); {hint}")
                said = time.monotonic()
            server.settimeout(1)
            # Nobody yet, or somebody who has no business here.
            with contextlib.suppress(OSError, ValueError):
                peer = _greet(server.accept()[0])
                here |= {peer.index: peer} if 0 < peer.index < cluster.count else {}
    for peer in here.values():
        with contextlib.suppress(OSError):  # its broken connection is noticed by the watch
            peer.socket.sendall(READY)
    return list(here.values())


def _server(cluster: Cluster) -> socket.socket:
    port = int(cluster.coordinator.rpartition(":")[2])
    both: Any = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    options = both if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", port), backlog=cluster.count, **options)
    except OSError as error:
        problem = f"port {port} of --coordinator {cluster.coordinator} cannot be opened here"
        raise MissingProcessError(
            f"{problem} ({error.strerror}); use another, the same everywhere"
        ) from (error)


def _greet(connection: socket.socket) -> Peer:
    connection.settimeout(10)
    index, name = _line(connection).decode().split(" ", 1)
    return Peer(int(index), name.strip(), _kept_alive(connection))


def _answer(cluster: Cluster, deadline: float, hint: str) -> Peer:
    host, _, port = cluster.coordinator.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall(f"{cluster.index} {socket.gethostname()}\n".encode())
            connection.settimeout(max(deadline + 5 - time.monotonic(), 1))
            answer = _line(connection)
        except OSError:  # not there yet
            answer = b""
        if answer == READY:
            return Peer(0, host, _kept_alive(connection))
        if answer:
            raise MissingProcessError(answer.decode().strip())
        if time.monotonic() > deadline:
            raise MissingProcessError(
                f"host 1 of {cluster.count} ({cluster.coordinator}) did not come; {hint}"
            )
        time.sleep(0.5)


def _line(connection: socket.socket) -> bytes:
    """What comes up to the end of a line, or of the connection."""
    text = b""
    while not text.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            break
        text += more
    return text


def _kept_alive(connection: socket.socket) -> socket.socket:
    """A connection that breaks if the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("IDLE", HEARTBEAT_S // 2), ("INTVL", 5), ("CNT", HEARTBEAT_S // 10)):
        if hasattr(socket, f"TCP_KEEP{name}"):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"), value)
    return connection


class Watch:
    """Ends this process, with a message, when another one dies.

    Process 0 hears it from the system and tells the others; the others hear of process 0's end.
    """

    def __init__(self, cluster: Cluster, peers: list[Peer]) -> None:
        self.cluster, self.peers, self.over = cluster, peers, False
        self._ears = [
            threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers
        ]
        for ear in self._ears:
            ear.start()

    def goodbye(self) -> None:
        """This process is done; nobody need end for it. The first may have more to do: wait."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.sendall(GOODBYE)
        for ear in self._ears if self.cluster.index else ():
            ear.join()

    def failed(self, error: BaseException) -> None:
        """This process ends with an error, and its own exit code; the others need not wait."""
        self.over = True
        reason = next(iter(str(error).splitlines()[-1:]), "")
        text = f"{self.cluster.me} failed: {type(error).__name__}: {reason}\n"
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.sendall(text.encode())

    def _listen(self, peer: Peer) -> None:
        try:
            heard = _line(peer.socket)
        except OSError:
            heard = b""
        if heard == GOODBYE:
            return
        if heard:  # what failed there may be failing here, with an exit code of its own
            time.sleep(GRACE_S)
        if self.over:
            return
        lost = f"host {peer.index + 1} of {self.cluster.count} ({peer.name}) is gone"
        lost = heard.decode().strip() or lost
        for other in self.peers:
            with contextlib.suppress(OSError):
                other.socket.sendall(f"{lost}\n".encode())
        say(f"{lost}; {self.cluster.me} ends too: start all of them again, to continue")
        os._exit(1)


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def from_first(numbers: list[int]) -> list[int]:
    """The first process's numbers, in every process."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.asarray(numbers, np.int32), count)  # the others' are only of that shape
    return multihost_utils.broadcast_one_to_all(mine).tolist() if count else []


def all_have(text: str) -> bool:
    """Whether the text is the same in all processes; every one must ask."""
    here = zlib.crc32(text.encode()) & 0x7FFFFFFF
    return all_agree(from_first([here]) == [here])


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes; every one must ask."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())
