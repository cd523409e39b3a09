"""Choose who evaluates: threads, local accelerators, processes, a cluster, or any executor."""

from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from numbers import Integral
from typing import Any

from gpipe_jax.utils.checks import check_count
from nas.pickles.sending import SharedFiles
from nas.workers import dask
from nas.workers.threads import DaemonThreads
from nas.workers.worker_pool import WorkerPool


def make_pool(workers: Any) -> WorkerPool:
    """Return the pool that the argument `workers` of `nas.search` describes.

    It is a number of threads, `devices`, `processes`, `processes:4`, the address of a dask
    scheduler, a dask client, an executor, or a pool.
    """
    if isinstance(workers, WorkerPool):
        return workers
    if isinstance(workers, Integral) and not isinstance(workers, bool):
        check_count("workers", workers)
        return of_executor(DaemonThreads(), int(workers))
    if isinstance(workers, Executor):
        return of_executor(workers)
    if workers == "devices":
        from nas.workers import devices

        return devices.device_pool()
    if isinstance(workers, str) and ("://" in workers or workers.split(":")[0] == "processes"):
        return dask.dask_pool(workers)
    if type(workers).__name__ == "Client":  # of dask, which may not be installed
        return dask.pool_of_client(workers)
    raise ValueError(
        f"workers {workers!r}: expected a number of threads, 'devices', 'processes', "
        "'processes:4', the address of a dask scheduler such as 'tcp://10.0.0.1:8786', a dask "
        "client or an executor"
    )


def of_executor(executor: Executor, slots: int | None = None) -> WorkerPool:
    """Return a pool of any executor, which stays open.

    Args:
        executor: The executor.
        slots: Number of jobs that it runs at once; default: the number of its workers.
    """
    slots = slots or getattr(executor, "_max_workers", None)  # of the standard library's
    if slots is None:
        raise ValueError(
            f"workers {executor!r} does not say how many jobs it runs at once: give an executor "
            "with max_workers, such as concurrent.futures.ThreadPoolExecutor(max_workers=8)"
        )

    def has_begun(future: Any) -> bool:
        return future.running() or future.done()

    count = slots
    pickles = isinstance(executor, ProcessPoolExecutor)
    files = SharedFiles()  # processes of an executor are on this machine
    pool = WorkerPool(
        executor.submit,
        lambda: count,
        pickles,
        has_begun=has_begun,
        close=files.close,
        share=files.share,
    )
    if isinstance(executor, DaemonThreads):
        return replace(pool, close=executor.close)
    return pool
