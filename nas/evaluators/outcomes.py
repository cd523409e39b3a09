"""Turn what an evaluation returned or raised into an `Outcome`."""

import math
import traceback
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nas.errors import ReturnError
from nas.evaluators.evaluator import TRAINED_VALUES, Job, Outcome


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those that have it."""
    names = dict.fromkeys(name for metrics in found for name in metrics)
    return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}


def read(returned: Any, job: Job) -> Outcome:
    """What an evaluator returned as an outcome; ReturnError if it cannot be one."""
    named = dict(returned) if isinstance(returned, Mapping) else {"fitness": returned}
    if "fitness" not in named:
        raise ReturnError(
            f"evaluate returned a dict with {', '.join(map(repr, named)) or 'nothing'} for "
            f"candidate {job.candidate}, but its fitness is looked up as 'fitness': add that"
        )
    values = named.pop(TRAINED_VALUES, None)
    if not (values is None or isinstance(values, str)):
        raise ReturnError(
            f"evaluate returned {TRAINED_VALUES} {_show(values)} for candidate {job.candidate}: "
            "expected a text, such as the name of a file with them"
        )
    numbers = {name: _number(name, value, job) for name, value in named.items()}
    fitness = numbers.pop("fitness")
    if not math.isfinite(fitness):
        return Outcome("nan", metrics=numbers, error=f"the fitness is {fitness}")
    return Outcome("ok", fitness, numbers, values)


def _number(name: str, value: Any, job: Job) -> float:
    shape = getattr(value, "shape", ())
    if shape == () and not isinstance(value, str | bytes | bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    of_shape = f" of shape {shape}" if shape else ""
    raise ReturnError(
        f"evaluate returned {_show(value)} ({type(value).__name__}{of_shape}) as {name} of "
        f"candidate {job.candidate}: expected one number"
    )


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def failure(error: BaseException) -> Outcome:
    """The outcome of a job that raised."""
    last = "".join(traceback.format_exception_only(error)).strip()
    return Outcome(_kind(error), error=last[:2000])


def _kind(error: BaseException) -> str:
    if _is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, FloatingPointError):  # also of jax_debug_nans
        return "nan"
    return "timeout" if isinstance(error, TimeoutError) else "exception"


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of an accelerator, whose errors jax raises by this name."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
