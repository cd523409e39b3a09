"""What a worker does with a job, and what the driver makes of one that did not come back."""

import functools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from nas.errors import ReturnError
from nas.evaluators.evaluator import Evaluator, Job, Outcome
from nas.evaluators.outcomes import as_outcome, failed_outcome
from nas.workers.dask import BEGUN

RESULT_S = 20.0  # how long the result of a job that is done may take to arrive

# --- on the worker --------------------------------------------------------------------------------


def run_job(evaluator: Evaluator, job: Job) -> Outcome:
    """Do a job; what the evaluator raises is an outcome. A wrong return is a ReturnError."""
    _say_begun()
    started = time.time()
    try:
        outcome = as_outcome(evaluator.evaluate(job), job)
    except ReturnError:
        raise
    except (Exception, SystemExit) as error:  # not the user's interrupt
        outcome = failed_outcome(error)
    return outcome._replace(worker=_name(), started=started, finished=time.time())


def make_task(evaluator: Evaluator, pickles: bool) -> Callable[[Job], Outcome]:
    """What to submit, so that a worker keeps one evaluator, and what that has compiled.

    ValueError if jobs are pickled and the evaluator cannot be.
    """
    if not pickles:
        return functools.partial(run_job, evaluator)
    try:
        return functools.partial(_run_pickled, dumps(evaluator))
    except Exception as error:  # of any object's own pickling
        raise ValueError(
            f"evaluate cannot be sent to workers in other processes ({error}): make it a function "
            "of a module that keeps no lock, file or connection, or use threads, workers=4"
        ) from error


def _run_pickled(pickled: bytes, job: Job) -> Outcome:
    try:
        evaluator = _evaluator(pickled)
    except Exception as error:  # such as of a module that is not on this machine
        return failed_outcome(error)._replace(worker=_name())
    return run_job(evaluator, job)


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


def _worker() -> Any:
    """The worker of a cluster that this is, or None."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None


def _say_begun() -> None:
    worker = _worker()
    if worker is not None:
        worker.log_event(BEGUN, worker.get_current_task())


def _name() -> str:
    worker = _worker()
    if worker is not None:
        return f"worker {worker.name}"
    thread = threading.current_thread()
    main = thread is threading.main_thread()
    return f"process {os.getpid()}" if main else thread.name


# --- on the driver --------------------------------------------------------------------------------


def outcome(future: Any) -> Outcome:
    """Of a future that is done; ReturnError if the evaluator is wrong."""
    try:
        return future.result(timeout=RESULT_S)
    except ReturnError:
        raise
    except TimeoutError:
        # A cluster fetches it now, and from a worker that died meanwhile it would wait for another
        # to do the job again, for as long as that takes.
        future.cancel()
        error = f"it was done, but its result did not come within {RESULT_S:g} s"
        return Outcome("worker_death", error=error)
    except (Exception, CancelledError) as error:
        # `run` lets nothing through, so that the worker, or the way to it, is gone.
        return Outcome("worker_death", error=f"{type(error).__name__}: {error}"[:2000])
