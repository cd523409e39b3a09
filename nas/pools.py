"""Who evaluates: threads of this process, processes of a local or remote cluster, or any executor.

A pool is an executor with the number of jobs it does at once.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from typing import Any

from nas import cluster
from nas.cluster import Pool


def pool(workers: Any) -> Pool:
    """Of a number of threads, `processes`, `processes:4`, the address of a dask scheduler, a dask
    client, an executor, or a pool as it is.
    """
    if isinstance(workers, Pool):
        return workers
    if isinstance(workers, int) and not isinstance(workers, bool):
        if workers < 1:
            raise ValueError(f"workers {workers}: expected at least 1")
        return of_executor(Threads(), workers)
    if isinstance(workers, Executor):
        return of_executor(workers)
    if isinstance(workers, str) and ("://" in workers or workers.split(":")[0] == "processes"):
        return cluster.pool(workers)
    if type(workers).__name__ == "Client":
        return cluster.of_client(workers)
    raise ValueError(
        f"workers {workers!r}: expected a number of threads, 'processes', 'processes:4', the "
        "address of a dask scheduler such as 'tcp://10.0.0.1:8786', a dask client or an executor"
    )


def of_executor(executor: Executor, slots: int | None = None) -> Pool:
    """A pool of any executor, which is left open; `slots` is how many jobs it does at once."""
    slots = slots or getattr(executor, "_max_workers", None)
    if slots is None:
        raise ValueError(
            f"workers {executor!r} does not say how many jobs it does at once: give "
            "nas.pools.of_executor(executor, slots=8)"
        )
    pickles = isinstance(executor, ProcessPoolExecutor)
    return Pool(
        executor.submit,
        slots,
        pickles,
        # A job that runs cannot be taken back from an executor: its report will be late.
        expire=lambda future: future.cancel(),
        begun=lambda future: future.running() or future.done(),
        close=executor.close if isinstance(executor, Threads) else lambda: None,
    )


class Threads(Executor):
    """A thread for each job at once; one that hangs neither blocks others nor the exit.

    It cannot be ended, so that it goes on beside the one that takes its place.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0

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
        """Have each thread end when it has nothing left to do."""
        for _ in range(self._count):
            self._jobs.put(None)
        self._count = 0

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            future, function, arguments = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, function, arguments
            self._idle.release()
