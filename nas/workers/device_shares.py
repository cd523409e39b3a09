"""Spread the jobs of one process over its devices: each job gets the device with the fewest.

A dask worker with several threads is such a process. Jobs never wait for a device here: how many
run at once is what the worker's threads say. JAX is used only if the evaluator has imported it.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

_lock = threading.Lock()
_jobs: Counter[Any] = Counter()  # by device


@contextmanager
def least_busy_device() -> Iterator[str | None]:
    """Let a job use the device with the fewest jobs; yield its name, None if there is no choice."""
    devices = _local_devices()
    if len(devices) < 2:
        yield None
        return
    with _lock:
        device = min(devices, key=lambda each: _jobs[each])
        _jobs[device] += 1
    try:
        with sys.modules["jax"].default_device(device):
            yield f"{device.platform} {device.id}"
    finally:
        with _lock:
            _jobs[device] -= 1


def shared_by(threads: int) -> Any:
    """Return the context of a job in a process that runs this many jobs at once."""
    return least_busy_device() if threads > 1 else nullcontext()


def _local_devices() -> list[Any]:
    if "jax" not in sys.modules:
        return []
    try:
        return sys.modules["jax"].local_devices()
    except RuntimeError:  # such as a TPU that another process has
        return []
