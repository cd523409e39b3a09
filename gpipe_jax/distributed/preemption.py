"""Handle the signals that end a run: finish the current step, save, and exit with code 75.

    SIGTERM             a supervisor, or a machine that is taken away
    SIGINT              Ctrl-C; a second one stops at once
    SIGHUP              a terminal or ssh connection that has closed; ignored under nohup
    SIGUSR1, SIGUSR2    a batch system, some time before its limit

A thread reads the signals, because Python's own handlers wait while the main thread compiles. No
JAX here, so that signals have their meaning before it is imported.
"""

import contextlib
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator

from gpipe_jax.utils.messages import say

PREEMPTED = 75  # exit code: the run is saved; run the same command again
INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_NO_SIGNAL = 0  # ends the thread that reads the numbers of signals


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
        _leave_lost_terminal()
        if self.is_requested and number == signal.SIGINT:
            _end(INTERRUPTED, "stopped at once; the newest checkpoint is unchanged")
        if self.is_requested:
            return
        self.is_requested = True
        name = signal.Signals(number).name
        if not self.has_unsaved and self.single_process:
            _end(PREEMPTED, f"{name}: stopping at once, as there is nothing to save")
        say(f"{name}: saving after this step (Ctrl-C: stop at once)")
        if not self.single_process:
            # JAX's preemption service makes all processes stop after the same step.
            os.kill(os.getpid(), signal.SIGTERM)


def _end(code: int, text: str) -> None:
    say(text)  # do not flush standard output: a full pipe would block
    os._exit(code)


def _leave_lost_terminal() -> None:
    """Discard output to a terminal that is gone: every line would raise an error."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextlib.contextmanager
def handle_signals(processes: int = 1) -> Iterator[StopRequest]:
    """Yield a `StopRequest` that signals set while the block runs; in the main thread only.

    Args:
        processes: The number of processes of the run. Default: 1.
    """
    stop = StopRequest(single_process=processes == 1)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # With several processes JAX's preemption service handles SIGTERM.
    numbers = _handled(SIGNALS if stop.single_process else SIGNALS[1:])
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = {number: signal.signal(number, _nothing) for number in numbers}
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read_signals, args=(read, stop), daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in previous.items():
            if signal.getsignal(number) is _nothing:  # else `ignore_signals` was called
                signal.signal(number, handler)
        # Closing the pipe would not end the thread while a forked process has it open.
        os.write(write, bytes([_NO_SIGNAL]))
        thread.join()
        os.close(write)
        os.close(read)


def ignore_signals() -> None:
    """Ignore the signals from now on: the process is ending, and its exit code must stay."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def run_program(command: Callable[[], int]) -> int:
    """Run the only command of a process, and return its exit code.

    Signals are handled from here on, before `command` imports what it needs. Once it has returned,
    they are ignored, because the interpreter takes a moment to exit.
    """
    with handle_signals():
        try:
            return command()
        finally:
            ignore_signals()


def _handled(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Return the signals to handle: all but SIGHUP if `nohup` ignores it."""
    is_off = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers if not (is_off and number == signal.SIGHUP)]


def _nothing(number: int, frame: object) -> None:
    """Do nothing: the thread has read the signal."""


def _read_signals(read: int, stop: StopRequest) -> None:
    while (number := os.read(read, 1)[0]) != _NO_SIGNAL:
        stop._handle(number)


def _restore_in_child() -> None:
    """Let SIGTERM end a forked process, such as a worker of a data set, and not stop the run.

    The signals of a terminal, which reach all its processes, have no effect in the child.
    """
    if any(signal.getsignal(number) is _nothing for number in SIGNALS):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_restore_in_child)
