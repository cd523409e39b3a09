"""Propose architectures by regularized evolution (Real et al. 2019, arXiv:1802.01548, algorithm 1).

Pure: no clock, no store, no workers, no JAX. With P the population and S the sample it is

    while there are fewer than P results:  propose a random architecture
    afterwards:                            propose a mutation of the best of S members
    whenever a result arrives:             add it, and remove the member trained least recently

Any number of proposals may be pending. Proposal k depends on (seed, k), on the population at the
time of the proposal, and on nothing else. So the order of proposals and results determines the
search.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from operator import attrgetter
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.keywords import suggesting
from nas.spaces import copies, returned
from nas.spaces.space import Space

Algorithm = Literal["aging", "non_aging", "elitist", "random"]
FitnessPolicy = Literal["stored", "retrain_scratch", "retrain_warm"]


def is_bool(value: Any) -> bool:
    """Return whether a value is True or False, also NumPy's."""
    return type(value).__name__ in ("bool", "bool_")


@suggesting()
@dataclass(frozen=True)
class Settings:
    """Hold everything that decides what a search proposes.

    `nas.search` and `nas.Search` take these fields as keyword arguments.

    Args:
        population: P, the number of members, at least 1. Default: 100.
        sample: S, the number of members in a tournament; the best of them is the parent.
            Default: 25.
        seed: Seed of all randomness. Default: 0.
        maximise: Whether a larger fitness is better. Default: True.
        replacement: Whether a member can be in a sample twice. The paper draws with replacement.
            Default: True.
        algorithm: Which member a result removes.
            "aging", the paper's, removes the member trained least recently.
            "non_aging", the paper's comparison, removes the worst of the sample of which the
            result's parent was the best.
            "elitist" removes the worst of all (Ying et al. 2019, arXiv:1902.09635).
            "random" proposes random architectures only.
            Default: "aging".
        fitness_policy: By which fitness the members of a sample are compared.
            "stored" uses the fitness that they have.
            "retrain_scratch" trains them again, from scratch.
            "retrain_warm" trains them again, from their trained weights.
            A member that was trained again is the youngest.
            Default: "stored".

    Raises:
        ValueError: A value is not legal.

    Example:
        >>> Settings(population=20, sample=5).better(0.9, 0.8)
        True
    """

    population: int = 100
    sample: int = 25
    seed: int = 0
    maximise: bool = True
    replacement: bool = True
    algorithm: Algorithm = "aging"
    fitness_policy: FitnessPolicy = "stored"

    def __post_init__(self) -> None:
        for name in ("population", "sample"):
            check_count(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))  # of NumPy: no JSON
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise ValueError(f"`seed` must be a whole number, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        for name in ("maximise", "replacement"):
            value = getattr(self, name)
            if not is_bool(value):
                raise ValueError(f"{name} {value!r}: expected True or False")
            object.__setattr__(self, name, bool(value))
        if not self.replacement and self.sample > self.population:
            raise ValueError(
                f"sample {self.sample} is more than population {self.population}, which cannot be "
                "drawn without replacement; make it smaller, or give replacement=True"
            )
        for name, legal in (("algorithm", Algorithm), ("fitness_policy", FitnessPolicy)):
            value, known = getattr(self, name), get_args(legal)
            if value not in known:
                raise ValueError(f"{name}: unknown {value!r}{did_you_mean_or_list(value, known)}")

    def to_dict(self) -> dict[str, Any]:
        """Return names and values, for the store."""
        return asdict(self)

    def better(self, a: float, b: float) -> bool:
        """Return whether a fitness is better than another.

        Args:
            a: The fitness that may be better.
            b: The other one.

        Returns:
            Whether `a` is larger than `b`, or smaller if the search minimises.
        """
        return a > b if self.maximise else a < b


_fitness = attrgetter("fitness")  # quicker than a function: each tournament calls it S times


@dataclass(frozen=True)
class Member:
    """Hold a member of the population: a candidate with its fitness."""

    candidate: int
    architecture: Any
    fitness: float
    last_trained: int  # stamp of its last training; later trainings have greater stamps


class Proposal(NamedTuple):
    """Hold an architecture to evaluate and its origin; without a parent it is random."""

    candidate: int
    architecture: Any
    parent: int | None = None
    mutation: str | None = None
    sample: tuple[int, ...] = ()
    """With `non_aging`, the candidates of which the parent was the best, for `Evolution.add`."""


class Evolution:
    """Hold the population and propose architectures from it."""

    def __init__(self, space: Space[Any], settings: Settings) -> None:
        self.space, self.settings = space, settings
        self.members: list[Member] = []  # ordered by `last_trained`
        self.results = 0  # of candidates, without retrainings

    @property
    def is_random(self) -> bool:
        """Return whether the next proposal is random, as it is before there are P results."""
        return self.settings.algorithm == "random" or self.results < self.settings.population

    def propose(self, candidate: int) -> Proposal:
        """Propose the architecture of a candidate; proposal k of the search is candidate k."""
        return self.child(candidate, [] if self.is_random else self.tournament(candidate))

    def tournament(self, candidate: int) -> list[Member]:
        """Draw the S members of which the best becomes the candidate's parent."""
        return self._draw_sample(self._random(candidate, "tournament"))

    def child(self, candidate: int, sample: Sequence[Member]) -> Proposal:
        """Mutate the best of the sample, the first of equals; draw at random if it is empty."""
        rng = self._random(candidate, "child")
        if not sample:
            return Proposal(candidate, copies.own(self.space.random(rng)))
        parent = self._best(sample)
        child, mutation = returned.child(self.space.mutate(copies.own(parent.architecture), rng))
        non_aging = self.settings.algorithm == "non_aging"
        candidates = tuple(member.candidate for member in sample) if non_aging else ()
        return Proposal(candidate, copies.own(child), parent.candidate, mutation, candidates)

    def add(self, member: Member, sample: Sequence[int] = ()) -> Member | None:
        """Add the result of a candidate and return the member that it removes, if any.

        `sample` is that of the candidate's proposal.
        """
        self._check_stamp(member.last_trained)
        removed = self.removed_by(member, sample)
        self.members.append(member)
        self.results += 1
        if removed is not None:
            self.members.remove(removed)
        return removed

    def removed_by(self, member: Member, sample: Sequence[int] = ()) -> Member | None:
        """Return the member that `add` would remove; change nothing."""
        if len(self.members) < self.settings.population:
            return None
        if self.settings.algorithm == "elitist":
            return self._worst([*self.members, member])
        if self.settings.algorithm == "non_aging":
            present = [m for m in self.members if m.candidate in sample]
            if not present:
                # A random candidate has no sample, and other results may have removed all of it.
                present = self._draw_sample(self._random(member.candidate, "removal"))
            return self._worst(present)
        return self.members[0]  # they are ordered by `last_trained`

    def refresh(self, candidate: int, fitness: float, last_trained: int) -> Member | None:
        """Update a member that was trained again and return it, or None if it was removed."""
        self._check_stamp(last_trained)
        for index, member in enumerate(self.members):
            if member.candidate == candidate:
                del self.members[index]
                member = replace(member, fitness=fitness, last_trained=last_trained)
                self.members.append(member)
                return member
        return None

    def _draw_sample(self, rng: Random) -> list[Member]:
        if self.settings.replacement:
            return rng.choices(self.members, k=self.settings.sample)
        return rng.sample(self.members, self.settings.sample)

    def _best(self, members: Sequence[Member]) -> Member:
        return (max if self.settings.maximise else min)(members, key=_fitness)

    def _worst(self, members: Sequence[Member]) -> Member:
        return (min if self.settings.maximise else max)(members, key=_fitness)

    def _random(self, candidate: int, purpose: str) -> Random:
        return Random(f"{self.settings.seed} {candidate} {purpose}")

    def _check_stamp(self, last_trained: int) -> None:
        if self.members and last_trained <= self.members[-1].last_trained:
            raise ValueError(
                f"last_trained {last_trained} is not after {self.members[-1].last_trained}, the "
                "newest member's: stamps increase with every training"
            )
