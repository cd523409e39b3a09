"""Threads as an executor that a job without end does not hold up.

They are daemons, which the end of a process cuts off wherever they are: within XLA, whose C++ lets
no exception through, that aborts the process, whatever its exit code was to be. So any process asks
jobs to end before its own end (`finish`), which trainings do after an epoch; what has not ended in
time is cut off nevertheless. The command line, whose exit codes count, is gone before (`leave`).
"""

import atexit
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

END_S = 5.0  # how long a process that ends waits for what is at work
_ending = threading.Event()
_busy: set[threading.Thread] = set()
_changed = threading.Condition()  # of that
_mine = threading.local()  # `closed`: that of the executor whose thread it is


class EndingError(BaseException):
    """Nobody waits for the job any more. It is no failure of it, nor is anybody told."""


def check_ending() -> None:
    """For jobs that can end between two steps: EndingError if the process or search is to end."""
    closed = getattr(_mine, "closed", None)
    if _ending.is_set() or (closed is not None and closed.is_set()):
        raise EndingError


def finish() -> None:
    """Ask the jobs to end, and wait at most `END_S` for it."""
    _ending.set()
    with _changed:
        _changed.wait_for(lambda: not _busy, END_S)


def leave(code: int) -> NoReturn:
    """End the process with this exit code, whatever is at work."""
    if _busy:
        for stream in (sys.stdout, sys.stderr):
            # Of a pipe whose reader is gone; closed; none at all.
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


class DaemonThreads(Executor):
    """A thread for each job at once; one that hangs holds up no other, and an exit but a while.

    It cannot be ended, so that it goes on beside the one that takes its place.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0
        self._closed = threading.Event()
        # The last is the first to be called: before JAX is taken down, which is loaded by now.
        atexit.unregister(finish)
        atexit.register(finish)

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Do it in a thread that has nothing to do, or in a new one."""
        future: Future = Future()
        self._jobs.put((future, partial(fn, **kwargs), args))
        if not self._idle.acquire(blocking=False):
            name = f"thread {self._count}"
            self._count += 1
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """Have each thread end when it has nothing left to do, and jobs that can end do so."""
        self._closed.set()
        for _ in range(self._count):
            self._jobs.put(None)
        self._count = 0

    def _work(self) -> None:
        _mine.closed = self._closed
        while (job := self._jobs.get()) is not None and not _ending.is_set():
            with _at_work():
                _do(*job)
            del job
            self._idle.release()


def _do(future: Future, function: Callable, arguments: tuple) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except EndingError:
            pass
        except BaseException as error:
            future.set_exception(error)


@contextmanager
def _at_work() -> Iterator[None]:
    thread = threading.current_thread()
    with _changed:
        _busy.add(thread)
    try:
        yield
    finally:
        with _changed:
            _busy.discard(thread)
            _changed.notify_all()
