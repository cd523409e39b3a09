"""`workers="devices"`: every accelerator of this process busy with a candidate of its own.

A thread for each device, so that none waits for another: candidates differ in what they cost. Each
compiles for its device, at the same time as the others do; JAX's cache on disk goes by device too,
but for GPUs, and so saves later runs their compilations, not a device another's. One program for
all, by `jax.shard_map`, takes as long when candidates do (scripts/benchmark_devices.py) and is
compiled once; but each round goes on only when its slowest candidate has ended, and one that is
stopped early, fails or hangs frees no device for another. So threads are what there is.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import jax
import numpy as np

from nas.errors import WorkersError
from nas.evaluators.evaluator import Job, Outcome
from nas.workers.dask import WorkerPool
from nas.workers.threads import DaemonThreads

Device = Any  # jax.Device, which is no type to type checkers

ANSWER_S = 60.0  # how long a device may take to answer; less than jobs may wait for one


def pool() -> WorkerPool:
    """Of all devices that are this process's own."""
    return DeviceAllocator(jax.local_devices()).pool()


class DeviceLease:
    """A job's time on a device."""

    device: Device | None = None
    over = False  # the device is no more the job's, or will not be


class DeviceAllocator:
    """Hands devices to jobs. One that answers no more is lost, until it answers after all."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._free, self._count = deque(devices), len(devices)
        self._lost: set[Device] = set()
        self._late: set[Device] = set()  # of these, who may answer yet
        self._reason = ""  # of the last loss
        self._changed = threading.Condition()
        self._threads = DaemonThreads()
        self._turns: dict[Future, DeviceLease] = {}

    def pool(self) -> WorkerPool:
        """For the driver."""
        return WorkerPool(
            self._submit,
            slots=self._count,
            pickles=False,
            expire=self._expire,
            has_begun=self._has_begun,
            close=self._threads.close,
            # With none left the next job is to be submitted, which says why.
            count_lost=lambda: min(len(self._lost), self._count - 1),
        )

    @property
    def _left(self) -> int:
        """Those that are, or may be, handed out again."""
        return self._count - len(self._lost - self._late)

    def _has_begun(self, future: Future) -> bool:
        turn = self._turns.get(future)
        return turn is None or turn.device is not None

    def _submit(self, task: Callable[[Job], Outcome], job: Job) -> Future:
        if not self._left:
            raise WorkersError(f"no device is left: {self._reason}")
        turn = DeviceLease()
        future = self._threads.submit(self._run, turn, task, job)
        self._turns[future] = turn
        future.add_done_callback(lambda done: self._turns.pop(done, None))
        return future

    def _run(self, turn: DeviceLease, task: Callable[[Job], Outcome], job: Job) -> Outcome:
        device = self._take(turn)
        threading.current_thread().name = name = f"{device.platform} {device.id}"
        lost = False
        try:
            with jax.default_device(device):
                outcome = task(job)
            lost = outcome.kind == "exception" and not self._answers(device)
            if lost:
                error = f"device {name} answers no more: {outcome.error}"
                outcome = outcome._replace(kind="worker_death", error=error)
            return outcome
        finally:
            self._give_back(turn, device, outcome.error or "" if lost else None)

    def _take(self, turn: DeviceLease) -> Device:
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self._left or turn.over)
            if turn.over:
                raise CancelledError  # it has waited for so long that nobody waits for it
            if not self._left:
                raise WorkersError(f"no device is left: {self._reason}")
            turn.device = self._free.popleft()
            return turn.device

    def _give_back(self, turn: DeviceLease, device: Device, lost: str | None) -> None:
        with self._changed:
            if lost is not None:
                self._lose(device, lost)
            elif not turn.over and device not in self._lost:  # by another job that had it
                self._free.append(device)
                self._changed.notify_all()
            turn.over = True

    def _lose(self, device: Device, reason: str) -> None:
        self._lost.add(device)
        self._reason = reason
        if device in self._free:  # as it was handed out twice
            self._free.remove(device)
        self._changed.notify_all()

    def _expire(self, future: Future) -> None:
        """What runs cannot be ended: it goes on beside the job that takes its place."""
        future.cancel()
        turn = self._turns.get(future)
        with self._changed:
            if turn and not turn.over:
                turn.over = True
                if turn.device:
                    self._threads.submit(self._take_back, turn.device)
                self._changed.notify_all()

    def _answers(self, device: Device) -> bool:
        try:
            return self._threads.submit(is_responsive, device).result(ANSWER_S)
        except TimeoutError:
            return False

    def _take_back(self, device: Device) -> None:
        """Hand a device out again when it answers; it is lost while that takes too long."""
        asked, late = self._threads.submit(is_responsive, device), False
        try:
            answered = asked.result(ANSWER_S)
        except TimeoutError:
            late = True
            with self._changed:
                self._late.add(device)
                self._lose(device, f"{device} has not answered for {ANSWER_S:g} s after a time-out")
            answered = asked.result()
        with self._changed:
            self._late.discard(device)
            if not answered:
                self._lose(device, f"{device} answers no more after a time-out")
            elif late or device not in self._lost:  # by the job, meanwhile
                self._lost.discard(device)
                self._free.append(device)
                self._changed.notify_all()


def is_responsive(device: Device) -> bool:
    """Whether a device still computes."""
    try:
        return float(jax.device_put(np.float32(1), device) + 1) == 2
    except Exception:  # of any backend's own
        return False
