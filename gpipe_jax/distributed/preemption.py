"""SIGTERM and Ctrl-C as a wish: finish the step under way, save, and end with exit code 75.

A thread hears the signals, for Python's own handlers wait while the main thread compiles.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from gpipe_jax.utils.console import say

PREEMPTED = 75  # exit code: saved, start it again
INTERRUPTED = 130


class Stop:
    """Whether the run is to stop.

    While `unsaved` is false there is nothing to save, and a signal ends a process that is `alone`
    at once; several end together, after a step.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone, self.requested, self.unsaved = alone, False, False
        self._asked = 0

    def reached(self) -> bool:
        """Whether to stop now; with several processes the same in all, who must ask equally often.

        Once it has been True they stop, and ask no more.
        """
        if self.alone:
            return self.requested
        from jax.experimental import multihost_utils

        self._asked += 1  # not the step, which stands still in an evaluation
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _hear(self, number: int) -> None:
        if self.requested and number == signal.SIGINT:
            _end(INTERRUPTED, "stopped at once; the newest checkpoint is as it was")
        if self.requested:
            return
        self.requested = True
        name = signal.Signals(number).name
        if not self.unsaved and self.alone:
            _end(PREEMPTED, f"{name}: ends at once, there is nothing to save")
        say(f"{name}: saving after this step (Ctrl-C: stop at once)")
        if not self.alone and number == signal.SIGINT:
            # To JAX's preemption service, which makes all processes stop after the same step.
            os.kill(os.getpid(), signal.SIGTERM)


def _end(code: int, text: str) -> None:
    say(text)  # and no flush of standard output, which a full pipe would block
    os._exit(code)


@contextlib.contextmanager
def listening(processes: int | None = None) -> Iterator[Stop]:
    """A `Stop` that hears signals while the block runs; in the main thread only.

    Give the number of processes before the devices are made, which asking JAX would do.
    """
    alone = (processes or jax.process_count()) == 1
    stop = Stop(alone)
    # With several processes SIGTERM is for JAX's preemption service, which has its own handler.
    numbers = [signal.SIGINT, *([signal.SIGTERM] if alone else [])]
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(read, stop), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        thread.join()
        os.close(read)


def _listen(read: int, stop: Stop) -> None:
    while heard := os.read(read, 1):
        stop._hear(heard[0])
