"""Turn what an evaluation returned or raised into an `Outcome`."""

import math
import traceback
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nas.errors import ReturnError
from nas.evaluators.evaluator import TRAINED_VALUES, Job, Outcome

MAX_ERROR = 2000  # characters of an error that are stored


def mean_metrics(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the evaluations that have it."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return {name: fmean(metrics[name] for metrics in each if name in metrics) for name in names}


def as_outcome(returned: Any, job: Job) -> Outcome:
    """Return the outcome of a job whose evaluator returned this.

    NaN is a failure of kind `nan`. True counts as 1, and False as 0. A metric that is not a number
    is left out, and `error` says so: the fitness, which took a training, is kept.

    Raises:
        ReturnError: It is neither a number nor a dict with a number as `fitness`.
    """
    named = dict(returned) if isinstance(returned, Mapping) else {"fitness": returned}
    if "fitness" not in named:
        raise ReturnError(
            f"evaluate returned a dict with {', '.join(map(repr, named)) or 'nothing'} for "
            f"candidate {job.candidate}, but its fitness is looked up as 'fitness': add that"
        )
    weights = named.pop(TRAINED_VALUES, None)
    if not (weights is None or isinstance(weights, str)):
        raise ReturnError(
            f"evaluate returned {TRAINED_VALUES} {_shortened(weights)} for candidate "
            f"{job.candidate}: expected a text, such as the name of a file with them"
        )
    value = named.pop("fitness")
    fitness = _number(value)
    if fitness is None:
        raise ReturnError(
            f"evaluate returned {_described(value)} as fitness of candidate {job.candidate}: "
            "expected one number"
        )
    metrics, left_out = _metrics(named)
    if math.isnan(fitness):
        return Outcome("nan", metrics=metrics, error=f"the fitness is {fitness}")
    return Outcome("ok", fitness, metrics, weights, error=left_out)


def _metrics(named: Mapping[Any, Any]) -> tuple[dict[str, float], str | None]:
    """Return the metrics that are numbers, and a text that lists the others."""
    metrics: dict[str, float] = {}
    left_out: list[str] = []
    for name, value in named.items():
        number = _number(value) if isinstance(name, str) else None
        if number is None:
            shown = name if isinstance(name, str) else _shortened(name)
            left_out.append(f"{shown} {_described(value)}")
        else:
            metrics[_in_utf_8(name)] = number
    if not left_out:
        return metrics, None
    text = f"{', '.join(left_out)} left out: metrics are numbers with texts as names"
    return metrics, _in_utf_8(text[:MAX_ERROR])


def _number(value: Any) -> float | None:
    """Return one number as a float, or None for anything else."""
    shape = getattr(value, "shape", ())  # of arrays; scalars of NumPy and JAX have ()
    if shape != () or isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (RuntimeError, MemoryError):  # of a computation, which ends only now
        raise
    except Exception:  # any object's own `float` may raise anything
        return None


def _described(value: Any) -> str:
    shape = getattr(value, "shape", ())
    kind = type(value).__name__ + (f" of shape {shape}" if shape else "")
    return f"{_shortened(value)} ({kind})"


def _shortened(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # any object's own `repr` may raise anything
        text = f"a {type(value).__name__} without a text"
    return text if len(text) <= 80 else f"{text[:77]}..."


def failed_outcome(error: BaseException) -> Outcome:
    """Return the outcome of a job that raised this error."""
    text = describe(error)
    return Outcome(_kind(error, text), error=text)


def describe(error: BaseException) -> str:
    """Return the type and the text of any error, for a store: short, and legal in UTF-8.

    >>> describe(ValueError("no"))
    'ValueError: no'
    """
    # An error's own `str` may raise; this says so instead of raising.
    return _in_utf_8("".join(traceback.format_exception_only(error)).strip()[:MAX_ERROR])


def _in_utf_8(text: str) -> str:
    """Replace what stores, pages and figures cannot hold, as in file names that are not UTF-8.

    >>> _in_utf_8("caf\\udce9")
    'caf\\\\udce9'
    """
    return text.encode(errors="backslashreplace").decode()


def _kind(error: BaseException, text: str) -> str:
    if _is_out_of_memory(error, text):
        return "out_of_memory"
    if isinstance(error, FloatingPointError):  # jax_debug_nans raises it too
        return "nan"
    return "timeout" if isinstance(error, TimeoutError) else "exception"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    """Check for lack of memory of the host, or of an accelerator, which JAX names this way."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
