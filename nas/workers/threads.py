"""Provide threads as an executor that a job without end does not block.

The threads are daemons, so the end of the process stops them at any point. A thread that is stopped
within XLA aborts the process, because its C++ lets no exception through; the exit code is lost. So
a process first asks its jobs to end (`finish`); trainings check for that after every epoch. Jobs
that have not ended in time are stopped nevertheless. The command line, whose exit codes matter,
skips the end of the interpreter instead (`leave`).
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

END_S = 5.0  # s that a process which ends waits for its jobs
_ending = threading.Event()  # set when the process is about to end
_busy: set[threading.Thread] = set()  # threads that run a job
_busy_changed = threading.Condition()
_of_thread = threading.local()  # `closed`: the event of the executor that this thread belongs to


class EndingError(BaseException):
    """End a job for which nobody waits any more: this is not a failure, and is not reported."""


def check_ending() -> None:
    """Raise EndingError if the process or the search is about to end.

    For jobs that can end between two steps.
    """
    closed = getattr(_of_thread, "closed", None)  # other threads do not have it
    if _ending.is_set() or (closed is not None and closed.is_set()):
        raise EndingError


def finish() -> None:
    """Ask all jobs to end, and wait at most `END_S` for them."""
    _ending.set()
    with _busy_changed:
        _busy_changed.wait_for(lambda: not _busy, END_S)


def leave(code: int) -> NoReturn:
    """End the process with this exit code, also while jobs are running."""
    if _busy:
        for stream in (sys.stdout, sys.stderr):
            # The stream may be missing or closed, or a pipe without a reader.
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


class DaemonThreads(Executor):
    """Run each job in a thread of its own; idle threads are used again.

    A job that hangs blocks no other one, and delays the end of the process by `END_S` at most. It
    cannot be stopped: it continues beside the job that takes its place.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0
        self._closed = threading.Event()
        # Functions registered last are called first: `finish` runs before JAX, which is imported
        # by now, is shut down.
        atexit.unregister(finish)
        atexit.register(finish)

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Run a function in an idle thread, or in a new one."""
        future: Future = Future()
        self._jobs.put((future, partial(fn, **kwargs), args))
        if not self._idle.acquire(blocking=False):
            name = f"thread {self._count}"
            self._count += 1
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """End each thread after its last job, and ask running jobs to end."""
        self._closed.set()
        for _ in range(self._count):
            self._jobs.put(None)
        self._count = 0

    def _work(self) -> None:
        _of_thread.closed = self._closed
        while (job := self._jobs.get()) is not None and not _ending.is_set():
            with _marked_busy():
                _run(*job)
            del job  # which may hold much memory, while the thread waits for the next one
            self._idle.release()


def _run(future: Future, function: Callable, arguments: tuple) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except EndingError:
            pass
        except BaseException as error:
            future.set_exception(error)


@contextmanager
def _marked_busy() -> Iterator[None]:
    thread = threading.current_thread()
    with _busy_changed:
        _busy.add(thread)
    try:
        yield
    finally:
        with _busy_changed:
            _busy.discard(thread)
            _busy_changed.notify_all()
