"""Wait at the start of a run until all its processes are connected, and name missing ones.

JAX aborts without naming them. So before JAX connects the processes, all of them connect to the
coordinator's port, where process 0 answers:

    process i   gpipe-jax process 2 of 4 node-c
    process 0   gpipe-jax welcome                 at once
    process 0   gpipe-jax ready                   when all are connected; or: gpipe-jax problem ...

Strangers may find the port: scanners, health checks, processes of other runs. Both sides ignore
whoever does not speak these lines, and limit each read in bytes and in time. But neither this
module nor JAX's own service on the port asks for a secret: open the port to the run's hosts only.
"""

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.errors import MissingProcessError
from gpipe_jax.utils.messages import say

LINE_BYTES = 1024  # the longest line
GREETING_S = 10  # the time for a first line
STRANGERS = 64  # connections that have not greeted yet, at most
HEARTBEAT_S = 30  # without a heartbeat a host counts as dead; JAX's own limit is 100 s

WELCOME, READY, PROBLEM = "gpipe-jax welcome", "gpipe-jax ready", "gpipe-jax problem "
_GREETING = re.compile(r"gpipe-jax process (\d{1,9}) of (\d{1,9}) (.{0,255})")
_HINT = "did you start the same command on every host (--worker=all)?"


class Peer(NamedTuple):
    """Hold a connection to another process."""

    index: int
    name: str  # the name of its machine
    socket: socket.socket


def wait_for_all(cluster: Cluster, timeout_s: float) -> list[Peer]:
    """Wait for all processes; raise MissingProcessError with the names of missing ones."""
    deadline = time.monotonic() + timeout_s
    if cluster.process_index:
        say(f"{cluster.label}, waiting for the others (time-out {timeout_s:g} s); {_HINT}")
        return [_connect(cluster, deadline)]
    with _server(cluster) as server, contextlib.closing(_RollCall(cluster, server)) as roll_call:
        last_message = 0.0
        while names := roll_call.missing():
            if time.monotonic() > deadline:
                names = f"{names} of {cluster.num_processes}"
                raise roll_call.failed(f"{names} did not connect within {timeout_s:g} s; {_HINT}")
            if time.monotonic() - last_message > 30:
                say(f"{cluster.label}, waiting for {names} (time-out {timeout_s:g} s); {_HINT}")
                last_message = time.monotonic()
            roll_call.listen(0.5)
        return roll_call.all_ready()


def read_line(connection: socket.socket, deadline: float | None = None) -> str:
    """Read up to the end of a line, or of the connection; read only the beginning of long lines.

    Raises:
        OSError: The connection is broken, or `deadline` (of `time.monotonic`) has passed.
    """
    text = b""
    while not text.endswith(b"\n") and len(text) < LINE_BYTES:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        more = connection.recv(1)
        if not more:
            break
        text += more
    return text.decode(errors="replace").strip()


def send_line(connection: socket.socket, text: str) -> None:
    """Send a line, cut off if it is too long; do nothing if the other side is gone."""
    with contextlib.suppress(OSError):
        connection.sendall(text.encode(errors="replace")[: LINE_BYTES - 1] + b"\n")


# --- process 0 ------------------------------------------------------------------------------------


class _Stranger:
    """Hold a connection that has not greeted yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.text = connection, b""
        self.deadline = time.monotonic() + GREETING_S


class _RollCall:
    """Collect the connections of the other processes, all at the same time."""

    def __init__(self, cluster: Cluster, server: socket.socket) -> None:
        self._cluster, self._server = cluster, server
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._peers: dict[int, Peer] = {}
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def close(self) -> None:
        """Close all connections except those of the peers."""
        for connection in [*self._strangers]:
            self._drop(connection)
        self._selector.close()

    def missing(self) -> str:
        """Return the names of missing hosts, or an empty text."""
        count = self._cluster.num_processes
        missing = [str(i + 1) for i in range(1, count) if i not in self._peers]
        noun = "hosts" if len(missing) > 1 else "host"
        return f"{noun} {', '.join(missing)}" if missing else ""

    def failed(self, problem: str) -> MissingProcessError:
        """Tell the peers, and return the error."""
        for peer in self._peers.values():
            send_line(peer.socket, PROBLEM + problem)
            peer.socket.close()
        return MissingProcessError(problem)

    def all_ready(self) -> list[Peer]:
        """Tell the peers that all are connected."""
        for peer in self._peers.values():
            _keep_alive(peer.socket)
            send_line(peer.socket, READY)  # if it is gone, the watcher sees that
        return [*self._peers.values()]

    def listen(self, seconds: float) -> None:
        """Handle what arrives within this time."""
        for key, _ in self._selector.select(seconds):
            connection: Any = key.fileobj
            with contextlib.suppress(OSError):  # it has disconnected
                if connection is self._server:
                    self._add(connection.accept()[0])
                elif connection in self._strangers:
                    self._read(self._strangers[connection])
                else:
                    self._lose(connection)
        late = [s for s in self._strangers.values() if s.deadline < time.monotonic()]
        for stranger in late:
            self._drop(stranger.connection)

    def _add(self, connection: socket.socket) -> None:
        if len(self._strangers) >= STRANGERS:
            self._drop(next(iter(self._strangers)))
        connection.setblocking(False)
        self._strangers[connection] = _Stranger(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, stranger: _Stranger) -> None:
        connection = stranger.connection
        try:
            more = connection.recv(LINE_BYTES - len(stranger.text))
        except OSError:
            more = b""
        stranger.text += more
        if stranger.text.endswith(b"\n"):
            self._greet(connection, stranger.text.decode(errors="replace").strip())
        elif not more or len(stranger.text) >= LINE_BYTES:
            self._drop(connection)

    def _greet(self, connection: socket.socket, text: str) -> None:
        greeting = _GREETING.fullmatch(text)
        if not greeting:
            return self._drop(connection)
        index, count, name = int(greeting[1]), int(greeting[2]), greeting[3]
        problem = self._problem(index, count)
        if problem:
            send_line(connection, PROBLEM + problem)
            return self._drop(connection)
        del self._strangers[connection]
        self._peers[index] = Peer(index, name, connection)
        send_line(connection, WELCOME)

    def _problem(self, index: int, count: int) -> str | None:
        """Return why a process that greets cannot belong to this run; None if it can."""
        expected = self._cluster.num_processes
        if count != expected:
            return (
                f"the run at {self._cluster.coordinator} has {expected} processes, but this host "
                f"expects {count}; give every host the same number, or every run its own port"
            )
        if not 0 < index < count:
            return (
                f"the index of this host is {index}; give it one from 1 to {count - 1} (--process)"
            )
        if index in self._peers:
            return (
                f"host {index + 1} of {count} is already connected ({self._peers[index].name}); "
                f"give every host its own index (--process)"
            )
        return None

    def _lose(self, connection: socket.socket) -> None:
        """Forget a peer that has disconnected; it may connect again."""
        self._peers = {i: p for i, p in self._peers.items() if p.socket is not connection}
        self._selector.unregister(connection)
        connection.close()

    def _drop(self, connection: socket.socket) -> None:
        del self._strangers[connection]
        self._selector.unregister(connection)
        connection.close()


def _server(cluster: Cluster) -> socket.socket:
    port = int(cluster.coordinator.rpartition(":")[2])
    options: Any = {}
    if socket.has_dualstack_ipv6():
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        backlog = cluster.num_processes + STRANGERS
        return socket.create_server(("", port), backlog=backlog, **options)
    except OSError as error:
        raise MissingProcessError(
            f"port {port} of the coordinator {cluster.coordinator} cannot be opened on this host "
            f"({error.strerror}); use another port, the same on every host"
        ) from error


# --- the other processes --------------------------------------------------------------------------


def _connect(cluster: Cluster, deadline: float) -> Peer:
    """Connect to process 0 as soon as it listens, whatever answers at its port until then."""
    answer = None
    for connection, answer in _answers(cluster, deadline):
        if answer == READY:
            _keep_alive(connection)
            return Peer(0, cluster.coordinator.rpartition(":")[0], connection)
        connection.close()
        if answer and answer.startswith(PROBLEM):
            raise MissingProcessError(answer.removeprefix(PROBLEM))
    problem = f"host 1 of {cluster.num_processes} ({cluster.coordinator}) did not answer; {_HINT}"
    if answer is not None:
        problem = (
            f"what answers at {cluster.coordinator} is not host 1 of a starting run; if it is a "
            f"running one, end it and start all its hosts again; else use another port"
        )
    raise MissingProcessError(problem)


def _answers(cluster: Cluster, deadline: float) -> Iterator[tuple[socket.socket, str | None]]:
    """Greet repeatedly until `deadline`; yield each connection with the answer.

    The answer is None if only a welcome arrives.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    count, name = cluster.num_processes, socket.gethostname()[:255]
    while True:
        with contextlib.suppress(OSError):  # process 0 does not listen yet
            connection = socket.create_connection((host, int(port)), timeout=5)
            send_line(connection, f"gpipe-jax process {cluster.process_index} of {count} {name}")
            answer: str | None = ""
            with contextlib.suppress(OSError):
                answer = read_line(connection, min(time.monotonic() + GREETING_S, deadline + 1))
                if answer == WELCOME:
                    answer = None
                    answer = read_line(connection, deadline + 5) or None
            yield connection, answer
        if time.monotonic() > deadline:
            return
        time.sleep(0.5)


def _keep_alive(connection: socket.socket) -> None:
    """Make a connection block, and break if the other machine dies."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("IDLE", HEARTBEAT_S // 2), ("INTVL", 5), ("CNT", HEARTBEAT_S // 10)):
        if hasattr(socket, f"TCP_KEEP{name}"):  # some systems lack it
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"), value)
