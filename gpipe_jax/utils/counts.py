"""Check whole numbers, such as counts and sizes."""

from typing import Any

from gpipe_jax.errors import ArgumentError


def count_problem(value: Any, minimum: int = 1) -> str | None:
    """Return the rule that a value breaks, or None if it is a whole number of at least `minimum`.

    True and False are no numbers.

    >>> count_problem(0), count_problem(True, minimum=0), count_problem(3)
    ('expected a whole number of at least 1', 'expected a whole number of at least 0', None)
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return None
    return f"expected a whole number of at least {minimum}"


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise ArgumentError unless the argument `name` is a whole number of at least `minimum`."""
    problem = count_problem(value, minimum)
    if problem is not None:
        raise ArgumentError(name, f"{name} {value!r}: {problem}")
