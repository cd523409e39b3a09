"""Fill in the arguments of a search that depend on each other, and check them together."""

import math
import sqlite3
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.ask_tell.limits import Limit, Retries
from nas.choices import check_directions
from nas.evaluators.evaluator import FAILURES, Job, Outcome
from nas.evolution.evolution import Settings, is_bool
from nas.evolution.length import Length, fitting, too_short
from nas.storage.reader import Reader


def settings(given: Mapping[str, Any], length: Length, path: Path) -> Settings:
    """Return the settings, with a population that fits the length of the search.

    A population that is not given, or None, is that of the run at `path`. In a new run it is 100,
    or half of the results if there are fewer than 100: then the sample is a quarter of it.

    Raises:
        ValueError: A value is not legal, or evolution would never begin.
    """
    known: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if value is not None or name not in ("population", "sample")
    }
    if "population" not in known:
        known = {**_left_out(known, length, path), **known}
    complete = Settings(**known)
    if complete.algorithm != "random" and length.smaller < complete.population:
        raise ValueError(too_short(length, complete.population))
    return complete


def _left_out(given: Mapping[str, Any], length: Length, path: Path) -> dict[str, Any]:
    """Return population and sample: those of the run, or some that fit a short search."""
    try:
        reader = Reader(path)
    except (OSError, ValueError, sqlite3.Error):  # no run, or none that can be resumed
        return fitting(given, length)
    try:
        stored = reader.study().settings
    finally:
        reader.close()
    return {name: stored[name] for name in ("population", "sample")}


def check(
    *,
    cache: Any,
    max_failures: Any,
    target: Any,
    lease_s: Any,
    retries: Any,
    compare: Any,
    directions: Any,
) -> None:
    """Check other arguments of `nas.Search`.

    Raises:
        ValueError: A value is not legal.
        TypeError: A value is of another type.
    """
    if not is_bool(cache) and not (isinstance(cache, Integral) and int(cache) >= 0):
        raise ValueError(
            f"cache {cache!r}: expected True, False, or how many times an architecture is "
            "evaluated before the mean answers"
        )
    check_count("max_failures", max_failures)
    if target is not None and not (_is_number(target) and not math.isnan(target)):
        raise ValueError(f"target {target!r}: expected a number, not NaN, or None for no target")
    if lease_s is not None and not (_is_number(lease_s) and lease_s > 0):
        raise ValueError(
            f"lease_s {lease_s!r}: expected seconds, more than 0, or None for no limit"
        )
    if not (retries is None or isinstance(retries, Retries)):
        raise TypeError(
            f"retries {retries!r}: expected nas.Retries, such as nas.Retries(exception=2)"
        )
    if not (compare is None or isinstance(compare, str)):
        raise TypeError(f"compare {compare!r}: expected the name of a metric, or None")
    try:
        check_directions(directions)
    except ValueError as error:
        raise ArgumentError("directions", f"directions: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def as_limits(limits: Any) -> tuple[Limit, ...]:
    """Return a list of limits as a tuple.

    Raises:
        ValueError: A name is reserved, or two limits have it.
        TypeError: It is not a list of limits.
    """
    is_list = isinstance(limits, list | tuple) and not isinstance(limits, Limit)
    wrong = [each for each in limits if not isinstance(each, Limit)] if is_list else [limits]
    if wrong:
        raise TypeError(
            f"limits: expected a list of nas.Limit, got {wrong[0]!r}; give for example "
            "limits=[nas.Limit('params_m', measure, at_most=3.5)]"
        )
    checked: tuple[Limit, ...] = tuple(limits)
    names = [limit.name for limit in checked]
    for name in names:
        if name in ("fitness", "trained_values"):
            raise ValueError(
                f"limits: {name!r} cannot be the name of a limit, as it is what an evaluator "
                "returns; give it another name"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"limits: {names.count(name)} of them have the name {name!r}, and one would hide "
                "the others; give each a name of its own"
            )
    return checked


def check_report(job: Any, outcome: Any = None) -> None:
    """Check the arguments of `tell`, `report` and `fail`.

    Raises:
        TypeError: The job is not a `Job`, or the outcome not an `Outcome`.
        ValueError: The kind of the outcome is unknown.
    """
    if not isinstance(job, Job):
        raise TypeError(f"job {job!r}: expected the nas.Job that `ask` returned")
    if outcome is None:
        return
    if not isinstance(outcome, Outcome):
        raise TypeError(
            f"outcome {outcome!r}: expected an Outcome of nas.evaluators.evaluator; for a fitness "
            "use `tell`, for a failure `fail`"
        )
    kinds = ("ok", *FAILURES)
    if outcome.kind not in kinds:
        raise ValueError(
            f"outcome of kind {outcome.kind!r} is unknown"
            f"{did_you_mean_or_list(outcome.kind, kinds)}"
        )
