"""Run `workers="devices"`: every accelerator of this process trains a candidate of its own.

There is a thread for each device, so that no device waits for another: candidates differ in cost.
Each thread compiles for its device, at the same time as the others. JAX's cache on disk depends on
the device too, except for GPUs; so it saves compilations of later runs, but not of other devices.

One program for all devices, by `jax.shard_map`, takes as long if candidates take equally long
(scripts/benchmark_devices.py), and is compiled once. But each of its rounds ends with the slowest
candidate, and a candidate that stops early, fails or hangs frees no device. Hence threads.

    free device --> job runs --> free again
                       |-- fails, and the device does not respond --> lost
                       |-- takes too long --> asked whether it responds --> free again, or lost
                                              (late meanwhile: lost, but may come back)
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
from nas.workers.threads import DaemonThreads
from nas.workers.worker_pool import WorkerPool

Device = Any  # jax.Device, which type checkers do not accept as a type
RESPONSE_S = 60.0  # s in which a device must respond; less than jobs may wait for one


def device_pool() -> WorkerPool:
    """Return a pool of all devices that belong to this process."""
    return DeviceAllocator(jax.local_devices()).pool()


class DeviceLease:
    """Hold the device that a job has, or waits for."""

    device: Device | None = None
    is_over = False  # the job no longer has the device, or will not get one


class DeviceAllocator:
    """Assign devices to jobs. A device that does not respond is lost until it responds."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._free, self._count = deque(devices), len(devices)
        self._lost: set[Device] = set()
        self._late: set[Device] = set()  # lost devices that may still respond
        self._reason = ""  # of the last loss
        self._changed = threading.Condition()
        self._threads = DaemonThreads()
        self._leases: dict[Future, DeviceLease] = {}

    def pool(self) -> WorkerPool:
        """Return the pool for the driver."""
        return WorkerPool(
            self._submit,
            count_slots=self._count_slots,
            pickles=False,
            expire=self._expire,
            has_begun=self._has_begun,
            close=self._threads.close,
        )

    def _count_slots(self) -> int:
        # If all are lost, the driver must submit one more job, whose error has the reason.
        return max(self._count - len(self._lost), 1)

    @property
    def _usable(self) -> int:
        """Count the devices that are assigned again, or may be."""
        return self._count - len(self._lost - self._late)

    def _has_begun(self, future: Future) -> bool:
        lease = self._leases.get(future)
        return lease is None or lease.device is not None

    def _submit(self, task: Callable[[Job], Outcome], job: Job) -> Future:
        if not self._usable:
            raise WorkersError(f"no device is left: {self._reason}")
        lease = DeviceLease()
        future = self._threads.submit(self._run, lease, task, job)
        self._leases[future] = lease
        future.add_done_callback(lambda done: self._leases.pop(done, None))
        return future

    def _run(self, lease: DeviceLease, task: Callable[[Job], Outcome], job: Job) -> Outcome:
        device = self._take(lease)
        threading.current_thread().name = name = f"{device.platform} {device.id}"
        reason_of_loss = None
        try:
            with jax.default_device(device):
                outcome = task(job)
            if outcome.kind == "exception" and not self._responds(device):
                reason_of_loss = f"device {name} no longer responds: {outcome.error}"
                outcome = outcome._replace(kind="worker_death", error=reason_of_loss)
            return outcome
        finally:
            self._give_back(lease, device, reason_of_loss)

    def _take(self, lease: DeviceLease) -> Device:
        """Wait for a free device."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self._usable or lease.is_over)
            if lease.is_over:
                raise CancelledError  # the job has expired while it waited
            if not self._usable:
                raise WorkersError(f"no device is left: {self._reason}")
            lease.device = self._free.popleft()
            return lease.device

    def _give_back(self, lease: DeviceLease, device: Device, reason_of_loss: str | None) -> None:
        with self._changed:
            if reason_of_loss is not None:
                self._lose(device, reason_of_loss)
            elif not lease.is_over and device not in self._lost:  # another job may have lost it
                self._free.append(device)
                self._changed.notify_all()
            lease.is_over = True

    def _lose(self, device: Device, reason: str) -> None:
        self._lost.add(device)
        self._reason = reason
        if device in self._free:  # if it was free again after a job that expired
            self._free.remove(device)
        self._changed.notify_all()

    def _expire(self, future: Future) -> None:
        """Abandon a job; if it is running, it continues beside the job that takes its place."""
        future.cancel()
        lease = self._leases.get(future)
        with self._changed:
            if lease and not lease.is_over:
                lease.is_over = True
                if lease.device:
                    self._threads.submit(self._recover, lease.device)
                self._changed.notify_all()

    def _responds(self, device: Device) -> bool:
        try:
            return self._threads.submit(is_responsive, device).result(RESPONSE_S)
        except TimeoutError:
            return False

    def _recover(self, device: Device) -> None:
        """Free a device when it responds; it is lost while that takes longer than `RESPONSE_S`."""
        response, is_late = self._threads.submit(is_responsive, device), False
        try:
            responds = response.result(RESPONSE_S)
        except TimeoutError:
            is_late = True
            with self._changed:
                self._late.add(device)
                self._lose(
                    device, f"{device} has not responded for {RESPONSE_S:g} s after a time-out"
                )
            responds = response.result()
        with self._changed:
            self._late.discard(device)
            if not responds:
                self._lose(device, f"{device} does not respond after a time-out")
            elif is_late or device not in self._lost:  # the expired job may have lost it meanwhile
                self._lost.discard(device)
                self._free.append(device)
                self._changed.notify_all()


def is_responsive(device: Device) -> bool:
    """Return whether a device still computes."""
    try:
        return float(jax.device_put(np.float32(1), device) + 1) == 2
    except Exception:  # every backend has errors of its own
        return False
