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

    A fitness that is not finite is a failure of kind `nan`.

    Raises:
        ReturnError: It is neither a number nor a dict of numbers with `fitness`.
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
    numbers = {name: _number(name, value, job) for name, value in named.items()}
    fitness = numbers.pop("fitness")
    if not math.isfinite(fitness):
        return Outcome("nan", metrics=numbers, error=f"the fitness is {fitness}")
    return Outcome("ok", fitness, numbers, weights)


def _number(name: str, value: Any, job: Job) -> float:
    shape = getattr(value, "shape", ())  # of arrays; scalars of NumPy and JAX have ()
    if shape == () and not isinstance(value, str | bytes | bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    kind = type(value).__name__
    if shape:
        kind += f" of shape {shape}"
    raise ReturnError(
        f"evaluate returned {_shortened(value)} ({kind}) as {name} of candidate {job.candidate}: "
        "expected one number"
    )


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
    text = "".join(traceback.format_exception_only(error)).strip()[:MAX_ERROR]
    return text.encode(errors="backslashreplace").decode()  # names of files may be no UTF-8


def _kind(error: BaseException, text: str) -> str:
    if _is_out_of_memory(error, text):
        return "out_of_memory"
    if isinstance(error, FloatingPointError):  # jax_debug_nans raises it too
        return "nan"
    return "timeout" if isinstance(error, TimeoutError) else "exception"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    """Check for lack of memory of the host, or of an accelerator, which JAX names this way."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
