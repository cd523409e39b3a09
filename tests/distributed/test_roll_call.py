"""Wait for all processes of a run, also where others find its port."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from ports import free_port

from gpipe_jax.distributed.cluster import Cluster
from gpipe_jax.distributed.roll_call import LINE_BYTES, read_line, send_line, wait_for_all
from gpipe_jax.errors import MissingProcessError


def connect_all(*clusters: Cluster, timeout_s: float) -> list:
    """Return the result of `wait_for_all` in each process, here a thread: peers, or the error."""
    results: list = [None] * len(clusters)

    def connect(i: int) -> None:
        try:
            results[i] = wait_for_all(clusters[i], timeout_s)
        except MissingProcessError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=connect, args=(i,)) for i in range(len(clusters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_connect():
    address = f"127.0.0.1:{free_port()}"
    first, *others = connect_all(*(Cluster(address, 4, i) for i in range(4)), timeout_s=20)
    assert sorted(peer.index for peer in first) == [1, 2, 3]
    assert {peer.name for peer in first} == {socket.gethostname()}
    assert [[peer.index for peer in peers] for peers in others] == [[0]] * 3


def test_missing_processes_are_named(capsys):
    address = f"127.0.0.1:{free_port()}"
    results = connect_all(*(Cluster(address, 4, i) for i in (0, 2)), timeout_s=2)
    problem = (
        "hosts 2, 4 of 4 did not connect within 2 s; did you start the same command on every host "
        "(--worker=all)?"
    )
    assert results == [problem, problem]
    shown = capsys.readouterr().err
    assert "host 1 of 4, waiting for hosts 2, 3, 4 (time-out 2 s); did you start" in shown


# --- strangers at the port of process 0 ----------------------------------------------------------

TEXTS = {
    "a scanner": [b"GET / HTTP/1.1\r\n\r\n"],
    "an earlier version": [b"1 somewhere\n"],
    "nothing": [],
    "not text": [b"\x00\x00\x12\x04\xff\n"],
    "no end": [b"x"] * 1000,
    "too long": [b"gpipe-jax process 1 of 2 " + b"x" * LINE_BYTES],
}


@contextlib.contextmanager
def stranger(port: int, texts: list[bytes]) -> Iterator[None]:
    """Connect, send texts with pauses, and stay."""
    ended = threading.Event()

    def disturb() -> None:
        connection = None
        while connection is None and not ended.wait(0.05):
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", port))
        if connection is None:
            return
        with connection, contextlib.suppress(OSError):
            for text in texts:
                connection.sendall(text)
                if ended.wait(0.01):
                    break
            ended.wait()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_strangers_are_ignored(texts):
    """Keep to the time-out, and count nobody as a host who does not speak as one."""
    port = free_port()
    start_s = time.monotonic()
    with stranger(port, texts), stranger(port, texts):
        (problem,) = connect_all(Cluster(f"127.0.0.1:{port}", 2, 0), timeout_s=1.5)
    assert problem.startswith("host 2 of 2 did not connect within 1.5 s")
    assert time.monotonic() - start_s < 5


def test_hosts_connect_beside_strangers():
    port = free_port()
    with contextlib.ExitStack() as stack:
        for texts in TEXTS.values():
            stack.enter_context(stranger(port, texts))
        first, second = connect_all(
            *(Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)), timeout_s=20
        )
    assert [peer.index for peer in first] == [1] and [peer.index for peer in second] == [0]


def test_many_connections_at_once_keep_no_host_out():
    port = free_port()
    with contextlib.ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(stranger(port, []))
        first, _ = connect_all(
            *(Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)), timeout_s=20
        )
    assert [peer.index for peer in first] == [1]


def test_the_process_of_another_run_is_told():
    address = f"127.0.0.1:{free_port()}"
    first, other = connect_all(Cluster(address, 3, 0), Cluster(address, 2, 1), timeout_s=2)
    assert first.startswith("hosts 2, 3 of 3 did not connect")
    assert other.startswith(f"the run at {address} has 3 processes, but this host expects 2; give")


def test_two_hosts_of_the_same_index():
    address = f"127.0.0.1:{free_port()}"
    clusters = [Cluster(address, 3, i) for i in (0, 1, 1)]
    first, *both = connect_all(*clusters, timeout_s=3)
    assert first.startswith("host 3 of 3 did not connect")
    refused = [text for text in both if "give every host its own index" in text]
    name = socket.gethostname()
    assert refused == [
        f"host 2 of 3 is already connected ({name}); give every host its own index (--process)"
    ]


def test_a_host_that_starts_again_takes_its_place():
    port = free_port()
    results: list = []
    waiting = threading.Thread(
        target=lambda: results.extend(wait_for_all(Cluster(f"127.0.0.1:{port}", 2, 0), 20))
    )
    waiting.start()
    for reads in (False, True):
        with connected(port) as connection:
            send_line(connection, "gpipe-jax process 1 of 3 node-c" if not reads else "x")
    with connected(port) as connection:
        send_line(connection, "gpipe-jax process 1 of 2 node-d")
        assert read_line(connection) == "gpipe-jax welcome"
        assert read_line(connection) == "gpipe-jax ready"
    waiting.join()
    assert [peer.name for peer in results] == ["node-d"]


def connected(port: int) -> socket.socket:
    """Return a connection as soon as somebody listens."""
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        time.sleep(0.05)


# --- strangers in place of process 0 -------------------------------------------------------------


def sends(*texts: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for text in texts:
            connection.sendall(text)
            time.sleep(0.01)

    return answer


ANSWERS = {
    # As the gRPC server of JAX, which has the port while a run is under way.
    "a run under way": sends(b"\x00\x00\x12\x04\x00\xfe\xff"),
    "another program": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "no end": sends(*[b"x"] * 2000),
}


@contextlib.contextmanager
def server(port: int, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """Answer every connection, one after the other, until the block ends."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        ended = threading.Event()

        def serve() -> None:
            listening.settimeout(0.05)
            while not ended.is_set():
                with contextlib.suppress(OSError), listening.accept()[0] as connection:
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_what_is_not_a_run_that_starts_is_no_host(answer):
    port = free_port()
    start_s = time.monotonic()
    with server(port, answer):
        (problem,) = connect_all(Cluster(f"127.0.0.1:{port}", 2, 1), timeout_s=1)
    assert problem == (
        f"what answers at 127.0.0.1:{port} is not host 1 of a starting run; if it is a running "
        f"one, end it and start all its hosts again; else use another port"
    )
    assert time.monotonic() - start_s < 8


def test_a_host_that_restarts_alone_waits_for_the_others():
    """Connect when the run under way has ended, and starts again."""
    port = free_port()
    address, results = f"127.0.0.1:{port}", []
    alone = threading.Thread(
        target=lambda: results.extend(wait_for_all(Cluster(address, 2, 1), 30))
    )
    with server(port, ANSWERS["a run under way"]):
        alone.start()
        time.sleep(1)
    wait_for_all(Cluster(address, 2, 0), 30)
    alone.join()
    assert [peer.index for peer in results] == [0]


def test_a_text_that_is_not_unicode_is_sent():
    """Such as an error that names a file in another encoding."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_line(ours, "no file caf\udce9")
        assert read_line(theirs) == "no file caf?"


def test_lines_are_read_within_limits():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\xff" * 10 * LINE_BYTES)
        assert len(read_line(ours)) == LINE_BYTES
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="timed out"):
        read_line(ours, time.monotonic() + 0.2)


# --- ports ---------------------------------------------------------------------------------------


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (problem,) = connect_all(Cluster(f"127.0.0.1:{port}", 2, 0), timeout_s=1)
    assert (
        f"port {port} of the coordinator 127.0.0.1:{port} cannot be opened on this host" in problem
    )


def test_the_first_is_missing():
    address = f"127.0.0.1:{free_port()}"
    (problem,) = connect_all(Cluster(address, 2, 1), timeout_s=1)
    assert problem.startswith(f"host 1 of 2 ({address}) did not answer; did you")
