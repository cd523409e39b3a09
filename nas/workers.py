"""Who evaluates: threads of this process, processes of a local or remote cluster, or any executor.

A `Pool` is an executor with the number of jobs it does at once. What is submitted is a job; what
comes back is its outcome. A worker that dies is an outcome too, which the driver, who is left to
tell, makes of the future's exception.
"""

import functools
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from nas.evaluate import Evaluator, Job, Outcome, ReturnError, failure, read


class WorkersError(RuntimeError):
    """The workers cannot be reached or started, or can take no more work."""


@dataclass(frozen=True)
class Pool:
    """Where jobs are done. `submit` gives a future; `expire` ends one that takes too long."""

    submit: Callable[..., Any]
    slots: int  # jobs at once
    pickles: bool  # whether jobs go to other processes
    expire: Callable[[Any], None]
    close: Callable[[], None] = lambda: None


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
        from nas import cluster

        return cluster.pool(workers)
    if type(workers).__name__ == "Client":
        from nas import cluster

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
            "nas.workers.of_executor(executor, slots=8)"
        )
    pickles = isinstance(executor, ProcessPoolExecutor)
    # A job that runs cannot be taken back from an executor: its report will be late.
    return Pool(executor.submit, slots, pickles, expire=lambda future: future.cancel())


class Threads(Executor):
    """A thread for each job at once; one that hangs neither blocks others nor the exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable, tuple]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Do it in a thread that has nothing to do, or in a new one."""
        future: Future = Future()
        self._jobs.put((future, functools.partial(fn, **kwargs), args))
        if not self._idle.acquire(blocking=False):
            name = f"thread {self._count}"
            self._count += 1
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, function, arguments = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del future, function, arguments
            self._idle.release()


# --- on the worker --------------------------------------------------------------------------------


def run(evaluator: Evaluator, job: Job) -> Outcome:
    """Do a job; what the evaluator raises is an outcome. A wrong return is a ReturnError."""
    started = time.time()
    try:
        outcome = read(evaluator.evaluate(job), job)
    except ReturnError:
        raise
    except Exception as error:
        outcome = failure(error)
    return outcome._replace(worker=_name(), started=started, finished=time.time())


def task(evaluator: Evaluator, pickles: bool) -> Callable[[Job], Outcome]:
    """What to submit, so that a worker keeps one evaluator, and what that has compiled."""
    if not pickles:
        return functools.partial(run, evaluator)
    return functools.partial(_run_pickled, dumps(evaluator))


def _run_pickled(pickled: bytes, job: Job) -> Outcome:
    return run(_evaluator(pickled), job)


@functools.lru_cache(maxsize=4)
def _evaluator(pickled: bytes) -> Evaluator:
    return pickle.loads(pickled)


def dumps(value: Any) -> bytes:
    """Pickled, functions of notebooks too where cloudpickle is installed, as it is with dask."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps(value)
    return cloudpickle.dumps(value)


def _name() -> str:
    if "distributed" in sys.modules:
        from distributed import get_worker

        try:
            return f"worker {get_worker().name}"
        except ValueError:
            pass  # not on a worker of a cluster
    name = threading.current_thread().name
    return name if name.startswith("thread") else f"process {os.getpid()}"


# --- on the driver --------------------------------------------------------------------------------


def outcome(future: Any) -> Outcome:
    """Of a future that is done; ReturnError if the evaluator is wrong."""
    try:
        return future.result()
    except ReturnError:
        raise
    except (Exception, CancelledError) as error:
        # `run` lets nothing through, so that the worker, or the way to it, is gone.
        return Outcome("worker_death", error=f"{type(error).__name__}: {error}"[:2000])
