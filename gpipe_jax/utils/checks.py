"""Check arguments that are whole numbers or fractions: one wording for each rule."""

from numbers import Integral
from typing import Any

from gpipe_jax.errors import ArgumentError


def count_problem(value: Any, minimum: int = 1) -> str | None:
    """Return the rule that a value breaks, or None if it is a whole number of at least `minimum`.

    Integers of NumPy are legal; True and False are not.

    >>> count_problem(0), count_problem(True, minimum=0)
    ('must be a whole number of at least 1', 'must be a whole number of at least 0')
    >>> count_problem(3)
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum:
        return None
    return f"must be a whole number of at least {minimum}"


def check_count(argument: str, value: Any, minimum: int = 1) -> int:
    """Return the argument as an int of Python, which does not overflow as NumPy's do.

    Raise ArgumentError unless it is a whole number of at least `minimum`.
    """
    problem = count_problem(value, minimum)
    if problem is not None:
        raise ArgumentError(argument, f"`{argument}` {problem}, got {value!r}")
    return int(value)


def check_counts(**counts: Any) -> None:
    """Raise ArgumentError unless each argument is a whole number of at least 1."""
    for argument, value in counts.items():
        check_count(argument, value)


def check_fraction(argument: str, value: float, *, zero: bool = True) -> None:
    """Raise ArgumentError unless the argument is below 1, and positive or (with `zero`) 0."""
    if not (0 <= value < 1 if zero else 0 < value < 1):
        least = "at least 0" if zero else "more than 0"
        raise ArgumentError(argument, f"`{argument}` must be {least} and less than 1, got {value}")
