"""Who evaluates: threads of this process, processes of a local or remote cluster, or any executor.

A pool is an executor with the number of jobs it does at once.
"""

from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from nas.workers import dask
from nas.workers.dask import WorkerPool
from nas.workers.threads import DaemonThreads


def make_pool(workers: Any) -> WorkerPool:
    """Of a number of threads, `devices`, `processes`, `processes:4`, the address of a dask
    scheduler, a dask client, an executor, or a pool as it is.
    """
    if isinstance(workers, WorkerPool):
        return workers
    if isinstance(workers, int) and not isinstance(workers, bool):
        if workers < 1:
            raise ValueError(f"workers {workers}: expected at least 1")
        return of_executor(DaemonThreads(), workers)
    if isinstance(workers, Executor):
        return of_executor(workers)
    if workers == "devices":
        from nas.workers import devices

        return devices.pool()
    if isinstance(workers, str) and ("://" in workers or workers.split(":")[0] == "processes"):
        return dask.dask_pool(workers)
    if type(workers).__name__ == "Client":
        return dask.pool_of_client(workers)
    raise ValueError(
        f"workers {workers!r}: expected a number of threads, 'devices', 'processes', "
        "'processes:4', the address of a dask scheduler such as 'tcp://10.0.0.1:8786', a dask "
        "client or an executor"
    )


def of_executor(executor: Executor, slots: int | None = None) -> WorkerPool:
    """A pool of any executor, which is left open; `slots` is how many jobs it does at once."""
    slots = slots or getattr(executor, "_max_workers", None)
    if slots is None:
        raise ValueError(
            f"workers {executor!r} does not say how many jobs it does at once: give "
            "nas.workers.pools.of_executor(executor, slots=8)"
        )
    pickles = isinstance(executor, ProcessPoolExecutor)
    return WorkerPool(
        executor.submit,
        slots,
        pickles,
        # A job that runs cannot be taken back from an executor: its report will be late.
        expire=lambda future: future.cancel(),
        has_begun=lambda future: future.running() or future.done(),
        close=executor.close if isinstance(executor, DaemonThreads) else lambda: None,
    )
