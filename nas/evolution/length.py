"""Say when a search is over, and which population fits its length."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpipe_jax.utils.checks import check_count
from nas.evolution.evolution import Settings

CYCLES = 1000
CYCLES_PER_EVALUATION = 10
"""Default number of results for each evaluation of a budget: a small space has no more networks."""


class Length(NamedTuple):
    """Say when a search is over: at this number of results, or of evaluations."""

    cycles: int
    evaluations: int | None

    @property
    def smaller(self) -> int:
        """Return the smaller number."""
        return self.cycles if self.evaluations is None else min(self.cycles, self.evaluations)

    @property
    def noun(self) -> str:
        """Return what progress is counted in: evaluations if there is a budget of them."""
        return "results" if self.evaluations is None else "evaluations"

    @property
    def total(self) -> int:
        """Return the number of these at the end."""
        return self.cycles if self.evaluations is None else self.evaluations

    def done(self, results: int, evaluations: int) -> int:
        """Return the number of these so far."""
        return results if self.evaluations is None else evaluations


def length(cycles: int | None, evaluations: int | None) -> Length:
    """Return the length of a search, with its defaults.

    Raises:
        ValueError: A number is not a whole number of at least 1.

    >>> length(None, None).cycles, length(None, 50).cycles, length(70, 50).cycles
    (1000, 500, 70)
    """
    if evaluations is not None:
        check_count("evaluations", evaluations)
        evaluations = int(evaluations)  # NumPy's cannot be written as JSON
    if cycles is None:
        cycles = CYCLES if evaluations is None else CYCLES_PER_EVALUATION * evaluations
    check_count("cycles", cycles)
    return Length(int(cycles), evaluations)


def fitting(given: Mapping[str, Any], length: Length) -> dict[str, Any]:
    """Return population and sample for a short search; nothing where the defaults fit.

    >>> fitting({}, Length(50, None)), fitting({}, Length(100, None))
    ({'population': 25, 'sample': 6}, {})
    """
    if given.get("algorithm") == "random" or length.smaller >= Settings.population:
        return {}
    population = max(1, length.smaller // 2)
    return {"population": population, "sample": max(1, population // 4)}


def too_short(length: Length, population: int, prefix: str = "") -> str:
    """Word that evolution would not begin before the search is over.

    >>> too_short(Length(5, None), 8, "evolution.")
    'cycles 5 is less than evolution.population 8: evolution begins when there are that many \
results; give more cycles, or a smaller population'
    """
    name = "cycles" if length.smaller == length.cycles else "evaluations"
    return (
        f"{name} {length.smaller} is less than {prefix}population {population}: evolution begins "
        f"when there are that many results; give more {name}, or a smaller population"
    )
