"""Workers that are processes, by dask.distributed: on this machine, or wherever a scheduler is.

A nanny restarts a worker that dies; its job is reported as dead, and tried again by the search's
own rules. A job that takes too long is ended with its worker; its time is from when a worker says
that it has begun.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nas.errors import WorkersError

ANSWER_S = 10.0  # how long a scheduler may take to answer
BEGUN = "nas job"  # the topic by which workers say that they have begun one
RESTART_S = 5.0  # how long a hung worker has to end by itself


@dataclass(frozen=True)
class WorkerPool:
    """Where jobs are done. `submit` gives a future; `expire` ends one that takes too long."""

    submit: Callable[..., Any]
    slots: int  # jobs at once, at first
    pickles: bool  # whether jobs go to other processes
    expire: Callable[[Any], None]
    has_begun: Callable[[Any], bool] = lambda future: True  # whether a job waits for no worker
    close: Callable[[], None] = lambda: None
    count_lost: Callable[[], int] = lambda: 0  # how many of the slots are gone, but for the last


def dask_pool(workers: str) -> WorkerPool:
    """Of `processes`, `processes:4`, or a scheduler's address."""
    try:
        import dask.config
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise WorkersError(
            f"workers {workers!r} need dask: pip install 'gpipe-jax[search]'"
        ) from error
    if "://" in workers:
        try:
            return pool_of_client(Client(workers, timeout=ANSWER_S), owned=True)
        except (OSError, TimeoutError, ValueError) as error:
            raise WorkersError(
                f"workers {workers!r}: no dask scheduler answers there within {ANSWER_S:g} s "
                f"({error}); start one with `dask scheduler`, or correct the address"
            ) from error
    count = _count(workers)
    # A worker's death is the search's to count, not the scheduler's to try again.
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        local = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            dashboard_address=None,  # type: ignore[arg-type]  # documented: no dashboard
        )
    return pool_of_client(Client(local), local=local, owned=True)


def _count(workers: str) -> int:
    text = workers.removeprefix("processes").removeprefix(":") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"workers {workers!r}: expected such as 'processes' or 'processes:4'")
    return int(text)


def pool_of_client(client: Any, *, local: Any = None, owned: bool = False) -> WorkerPool:
    """A pool of a cluster's workers, as many jobs at once as they have threads."""
    slots = sum(client.nthreads().values())
    if not slots:
        raise WorkersError(
            f"the dask scheduler {client.scheduler.address if client.scheduler else ''} has no "
            "workers: start some with `dask worker ADDRESS`"
        )

    def expire(future: Any) -> None:
        hung = [worker for worker, keys in client.processing().items() if future.key in keys]
        future.cancel()
        if hung:
            client.restart_workers(hung, timeout=RESTART_S, raise_for_error=False)

    def close() -> None:
        client.close()
        if local is not None:
            local.close()

    begun: set[str] = set()
    client.subscribe_topic(BEGUN, lambda event: begun.add(event[1]))

    def submit(task: Any, job: Any) -> Any:
        future = client.submit(task, job, pure=False)
        future.add_done_callback(lambda done: begun.discard(done.key))
        return future

    return WorkerPool(
        submit,
        slots,
        True,
        expire,
        lambda future: future.key in begun,
        close if owned else _nothing,
    )


def _nothing() -> None:
    """A client of the user's is left open."""
