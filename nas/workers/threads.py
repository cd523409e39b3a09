"""Provide threads as an executor that a job without end does not block.

The threads are daemons, so the end of the process stops them at any point. A thread that is stopped
within XLA aborts the process, because its C++ lets no exception through; the exit code is lost. So
a process first asks its jobs to end (`finish`); trainings check for that after every epoch. Others
are interrupted as soon as they are in Python, and the process waits for those in XLA. Jobs that
hang elsewhere are stopped nevertheless. The command line, whose exit codes matter, skips the end of
the interpreter instead (`leave`).
"""

import atexit
import ctypes
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from gpipe_jax.utils.messages import say

END_S = 5.0  # s that a process which ends waits for its jobs
XLA_END_S = 120.0  # s that it waits further while they are in XLA, as in a long compilation
SAMPLE_S = 0.5  # s between two looks at them
BUSY_FRACTION = 0.2  # of a processor; a process that uses less is not computing
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
    """Ask all jobs to end, and wait for them: at most `END_S`, or `XLA_END_S` while XLA works."""
    _ending.set()
    if _wait_for_jobs(END_S):
        return
    deadline, is_said = time.monotonic() + XLA_END_S, False
    while time.monotonic() < deadline:
        for thread in _running():
            _interrupt(thread)
        used_s = time.process_time()
        if _wait_for_jobs(SAMPLE_S):
            return
        computes = time.process_time() - used_s > BUSY_FRACTION * SAMPLE_S
        if not computes and not any(map(_is_in_jax, _running())):
            return  # they hang, but not in XLA
        if not is_said:
            say("waiting for XLA, which cannot be stopped before it is done", "nas")
        is_said = True


def _wait_for_jobs(seconds: float) -> bool:
    """Return whether all jobs have ended within this time."""
    with _busy_changed:
        return _busy_changed.wait_for(lambda: not _running(), seconds)


def _running() -> list[threading.Thread]:
    """Return the threads with a job; one that was interrupted at its end is still marked."""
    return [thread for thread in list(_busy) if thread.is_alive()]


def _interrupt(thread: threading.Thread) -> None:
    """Raise EndingError in a thread, as soon as it is in Python."""
    ident, error = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(EndingError)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)


def _is_in_jax(thread: threading.Thread) -> bool:
    """Return whether JAX has called what a thread is waiting for, as when it compiles."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "jax":
            return True
        frame = frame.f_back
    return False


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
        with suppress(EndingError):  # of a job that ended when it was interrupted
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
