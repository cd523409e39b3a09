"""Run jobs in processes, with dask.distributed: on this machine, or where a scheduler is.

A nanny restarts a worker that dies; its job fails as `worker_death`, and the search's own rules say
whether it is retried. A job that takes too long is ended together with its worker. Its time counts
from when a worker reports that it has begun.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from gpipe_jax.utils.text import install_advice
from nas.errors import WorkersError
from nas.evaluators.outcomes import describe
from nas.workers import main_guard
from nas.workers.dask_census import ANSWER_S, Census
from nas.workers.worker_pool import WorkerPool

BEGUN = "nas job"  # topic on which workers report that they have begun a job
RESTART_S = 5.0  # s in which a hung worker may end by itself


def dask_pool(workers: str) -> WorkerPool:
    """Return a pool for `processes`, `processes:4`, or the address of a scheduler."""
    try:
        from distributed import Client
    except ImportError as error:
        raise WorkersError(f"workers {workers!r} need dask: {install_advice('search')}") from error
    if "://" in workers:
        try:
            return pool_of_client(Client(workers, timeout=ANSWER_S), owned=True)
        except (OSError, TimeoutError, ValueError) as error:
            raise WorkersError(
                f"workers {workers!r}: no dask scheduler answers there within {ANSWER_S:g} s "
                f"({error}); start one with `dask scheduler`, or correct the address"
            ) from error
    local = _local_cluster(workers, _count(workers))
    return pool_of_client(Client(local), local=local, owned=True)


def _local_cluster(workers: str, count: int) -> Any:
    import dask.config
    from distributed import LocalCluster

    # The search counts the deaths of workers and retries their jobs; the scheduler must not.
    settings = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    try:
        with settings, main_guard.quiet_workers(), _silent("distributed.nanny"):
            return LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                dashboard_address=None,  # type: ignore[arg-type]  # documented: no dashboard
            )
    except (RuntimeError, OSError) as error:  # TimeoutError is an OSError
        cause = describe(error.__cause__ or error)
        raise WorkersError(
            f"workers {workers!r} cannot be started ({cause}); {main_guard.ADVICE}"
        ) from None  # dask's own traceback has pages


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Print nothing from this logger: the error that is raised instead says it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _count(workers: str) -> int:
    text = workers.removeprefix("processes").removeprefix(":") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"workers {workers!r}: expected 'processes' or, for four, 'processes:4'")
    return int(text)


def pool_of_client(client: Any, *, local: Any = None, owned: bool = False) -> WorkerPool:
    """Return a pool of a cluster's workers; it runs as many jobs at once as they have threads.

    Workers may come and go.

    Args:
        client: A `distributed.Client`.
        local: A local cluster to close with the pool, or None.
        owned: Whether the pool closes the client; a client of the user's stays open.
    """
    name = f"the dask scheduler {client.scheduler.address if client.scheduler else ''}".strip()
    census = Census(client)
    if not census.count():
        census.close()
        raise WorkersError(f"{name} has no workers: start some with `dask worker ADDRESS`")

    def expire(future: Any) -> None:
        if not census.count():
            return cancel(future)
        hung = [worker for worker, keys in client.processing().items() if future.key in keys]
        future.cancel()
        if hung:
            client.restart_workers(hung, timeout=RESTART_S, raise_for_error=False)

    def cancel(future: Any) -> None:
        if client.status == "running":  # else the scheduler has forgotten it
            client.loop.add_callback(client.cancel, [future], asynchronous=True)

    def close() -> None:
        census.close()
        if census.count():  # else the scheduler would be waited for
            shared.close()
        if owned:
            client.close()
        if local is not None:
            local.close()

    from nas.pickles.dask_plugin import ClusterShare

    shared = ClusterShare(client)
    begun: set[str] = set()  # keys of futures

    def introduce() -> None:
        client.subscribe_topic(BEGUN, lambda event: begun.add(event[1]))
        shared.renew()

    introduce()
    census.on_reconnect = introduce

    def submit(task: Any, job: Any) -> Any:
        future = client.submit(task, job, pure=False)
        future.add_done_callback(lambda done: begun.discard(done.key))
        return future

    def has_begun(future: Any) -> bool:
        return future.key in begun

    return WorkerPool(
        submit, census.count, True, expire, has_begun, close, cancel, name, shared.share
    )
