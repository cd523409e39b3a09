"""Run a job on a worker, and turn its future into an outcome on the driver."""

import functools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from nas.errors import ReturnError, WorkersError
from nas.evaluators.evaluator import Evaluator, Job, Outcome
from nas.evaluators.outcomes import as_outcome, describe, failed_outcome
from nas.pickles import pickling
from nas.pickles.sending import Parcel
from nas.workers import device_shares
from nas.workers.dask import BEGUN
from nas.workers.threads import EndingError
from nas.workers.worker_pool import WorkerPool

RESULT_S = 20.0  # s in which the result of a finished job must arrive

# --- on the worker --------------------------------------------------------------------------------


def run_job(evaluator: Evaluator, job: Job) -> Outcome:
    """Run a job and return its outcome, which is a failure if the evaluator raises.

    Raises:
        ReturnError: The evaluator returned no fitness.
    """
    _report_begun()
    started = time.time()
    with device_shares.shared_by(_jobs_at_once()) as device:
        try:
            outcome = as_outcome(evaluator.evaluate(job), job)
        except (ReturnError, KeyboardInterrupt, EndingError):  # an interrupt is the user's
            raise
        except BaseException as error:  # such as SystemExit, or CancelledError of asyncio
            outcome = failed_outcome(error)
    name = _worker_name() if device is None else f"{_worker_name()}, {device}"
    return outcome._replace(worker=name, started=started, finished=time.time())


def make_task(evaluator: Evaluator, pool: WorkerPool) -> Callable[[Any], Outcome]:
    """Return the function to submit with each job, or with each `pickled_job` if jobs are pickled.

    A worker in another process keeps one evaluator, with everything that it has compiled.

    Raises:
        ValueError: Jobs are pickled, and the evaluator cannot be.
    """
    if not pool.pickles:
        return functools.partial(run_job, evaluator)
    try:
        return functools.partial(_run_pickled, pool.share(pickling.dumps(evaluator)))
    except Exception as error:  # any object's own pickling may raise anything
        raise ValueError(
            f"evaluate cannot be sent to workers in other processes ({describe(error)}): make it a "
            "function of a module that keeps no lock, file or connection, or use threads, workers=4"
        ) from error


def pickled_job(job: Job) -> bytes:
    """Return a job as workers in other processes take it.

    Raises:
        WorkersError: Its architecture cannot be pickled. This is no failure of the candidate: no
            attempt would succeed.
    """
    try:
        return pickling.dumps(job)
    except Exception as error:  # any object's own pickling may raise anything
        raise WorkersError(
            f"the architecture of candidate {job.candidate} cannot be sent to workers in other "
            f"processes ({describe(error)}): make architectures of plain values, such as tuples, "
            "numbers and texts, or use threads, workers=4"
        ) from error


def _run_pickled(parcel: Parcel, pickled_job: bytes) -> Outcome:
    try:
        evaluator, job = _unpickled(parcel), pickle.loads(pickled_job)
    except Exception as error:  # such as a module that this machine does not have
        return failed_outcome(error)._replace(worker=_worker_name())
    return run_job(evaluator, job)


@functools.lru_cache(maxsize=4)
def _unpickled(parcel: Parcel) -> Evaluator:
    return pickle.loads(parcel.open())


def _dask_worker() -> Any:
    """Return the dask worker that this process is, or None."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def _jobs_at_once() -> int:
    """Return how many jobs this process runs at once, as far as a cluster decides that."""
    worker = _dask_worker()
    return 1 if worker is None else worker.state.nthreads


def _report_begun() -> None:
    worker = _dask_worker()
    if worker is not None:
        worker.log_event(BEGUN, worker.get_current_task())


def _worker_name() -> str:
    worker = _dask_worker()
    if worker is not None:
        return f"worker {worker.name}"
    thread = threading.current_thread()
    return f"process {os.getpid()}" if thread is threading.main_thread() else thread.name


# --- on the driver --------------------------------------------------------------------------------


def outcome_of(future: Any) -> Outcome:
    """Return the outcome of a finished future.

    Raises:
        ReturnError: The evaluator returned no fitness.
    """
    try:
        return future.result(timeout=RESULT_S)
    except ReturnError:
        raise
    except TimeoutError:
        # A cluster fetches the result only now. If its worker died meanwhile, the cluster would
        # wait until another worker has repeated the job.
        future.cancel()
        error = f"it was done, but its result did not come within {RESULT_S:g} s"
        return Outcome("worker_death", error=error)
    except (Exception, CancelledError) as error:
        # `run_job` catches the evaluator's errors: the worker is lost, or the connection to it.
        return Outcome("worker_death", error=describe(error))
