"""Handle SIGTERM and Ctrl-C: finish the current step, save, and exit with code 75.

A thread reads the signals, because Python's own handlers wait while the main thread compiles.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from gpipe_jax.utils.messages import say

PREEMPTED = 75  # exit code: the run is saved; run the same command again
INTERRUPTED = 130


class StopRequest:
    """Record whether the run has to stop.

    While `has_unsaved` is false there is nothing to save, and a signal ends a single process at
    once. Several processes end together, after a step.
    """

    def __init__(self, single_process: bool = True) -> None:
        self.single_process = single_process
        self.is_requested = False
        self.has_unsaved = False
        self._calls = 0

    def should_stop(self) -> bool:
        """Return whether to stop now.

        Several processes get the same answer, and must call this equally often. After True, none
        may call it again.
        """
        if self.single_process:
            return self.is_requested
        from jax.experimental import multihost_utils

        self._calls += 1  # not the step, which does not advance in an evaluation
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def _handle(self, number: int) -> None:
        if self.is_requested and number == signal.SIGINT:
            _end(INTERRUPTED, "stopped at once; the newest checkpoint is unchanged")
        if self.is_requested:
            return
        self.is_requested = True
        name = signal.Signals(number).name
        if not self.has_unsaved and self.single_process:
            _end(PREEMPTED, f"{name}: stopping at once, as there is nothing to save")
        say(f"{name}: saving after this step (Ctrl-C: stop at once)")
        if not self.single_process and number == signal.SIGINT:
            # JAX's preemption service makes all processes stop after the same step.
            os.kill(os.getpid(), signal.SIGTERM)


def _end(code: int, text: str) -> None:
    say(text)  # do not flush standard output: a full pipe would block
    os._exit(code)


@contextlib.contextmanager
def handle_signals(processes: int | None = None) -> Iterator[StopRequest]:
    """Yield a `StopRequest` that signals set while the block runs; in the main thread only.

    Give the number of processes if devices must not be initialized yet: asking JAX for it does so.
    """
    single_process = (processes or jax.process_count()) == 1
    stop = StopRequest(single_process)
    # With several processes JAX's preemption service handles SIGTERM.
    numbers = [signal.SIGINT, signal.SIGTERM] if single_process else [signal.SIGINT]
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read_signals, args=(read, stop), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(write)
        thread.join()
        os.close(read)


def _read_signals(read: int, stop: StopRequest) -> None:
    while received := os.read(read, 1):
        stop._handle(received[0])
