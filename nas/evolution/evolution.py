"""Regularized evolution (Real et al. 2019, https://arxiv.org/abs/1802.01548, algorithm 1).

Pure: no clock, no store, no workers, no JAX. With P the population and S the sample it is

    while there are fewer than P results:  propose a random architecture
    afterwards:                            propose a mutation of the best of S members
    whenever a result comes in:            add it, and remove the member trained least recently

however many proposals are under way. Proposal k depends on (seed, k) and on the population at the
time of the proposal, and on nothing else, so that whoever knows the order of proposals and results
knows the search.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, Literal, NamedTuple, get_args

from nas.spaces.space import Space

Algorithm = Literal["aging", "non_aging", "elitist", "random"]
FitnessPolicy = Literal["stored", "retrain_scratch", "retrain_warm"]


@dataclass(frozen=True)
class Settings:
    """All that decides what a search proposes; see the fields."""

    population: int = 100
    sample: int = 25
    seed: int = 0
    maximise: bool = True
    replacement: bool = True
    """Whether a member can be in a sample twice; the paper draws with replacement."""
    algorithm: Algorithm = "aging"
    """Whom a result removes: the member trained least recently (`aging`, the paper's), the worst
    of the sample of which its parent was the best (`non_aging`: the paper's comparison), or the
    worst of all (`elitist`, that of Ying et al. 2019, https://arxiv.org/abs/1902.09635). `random`
    proposes random architectures only."""
    fitness_policy: FitnessPolicy = "stored"
    """What a member of a sample is judged by: its fitness as it is, or after training it again,
    from scratch or from its trained values. Being trained makes a member young again."""

    def __post_init__(self) -> None:
        for name in ("population", "sample"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}: expected a whole number of at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed {self.seed!r}: expected a whole number")
        for name in ("maximise", "replacement"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r}: expected True or False")
        if not self.replacement and self.sample > self.population:
            raise ValueError(
                f"sample {self.sample} is more than population {self.population}, which cannot be "
                "drawn without replacement; make it smaller, or give replacement=True"
            )
        for name, legal in (("algorithm", Algorithm), ("fitness_policy", FitnessPolicy)):
            if getattr(self, name) not in get_args(legal):
                raise ValueError(
                    f"{name}: unknown {getattr(self, name)!r}; known: {', '.join(get_args(legal))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Names and values, for the store."""
        return asdict(self)

    def better(self, a: float, b: float) -> bool:
        """Whether fitness `a` is better than `b`."""
        return a > b if self.maximise else a < b


@dataclass(frozen=True)
class Member:
    """A candidate with its fitness. `last_trained` is greater the later it was trained."""

    candidate: int
    architecture: Any
    fitness: float
    last_trained: int


class Proposal(NamedTuple):
    """What to evaluate next, and where it comes from: no parent means a random architecture."""

    candidate: int
    architecture: Any
    parent: int | None = None
    mutation: str | None = None
    sample: tuple[int, ...] = ()
    """With `non_aging` the candidates of which the parent was the best, for `Evolution.add`."""


class Evolution:
    """The population, and what it proposes."""

    def __init__(self, space: Space[Any], settings: Settings) -> None:
        self.space, self.settings = space, settings
        self.members: list[Member] = []  # the one trained least recently first
        self.results = 0  # of candidates, retrainings apart

    @property
    def is_random(self) -> bool:
        """Whether the next proposal is a random architecture; results count, not proposals."""
        return self.settings.algorithm == "random" or self.results < self.settings.population

    def propose(self, candidate: int) -> Proposal:
        """The architecture of a candidate: proposal k of the search is candidate k."""
        return self.child(candidate, [] if self.is_random else self.tournament(candidate))

    def tournament(self, candidate: int) -> list[Member]:
        """The S members of which the candidate's parent is to be the best."""
        return self._draw_sample(self._random(candidate, "tournament"))

    def child(self, candidate: int, sample: Sequence[Member]) -> Proposal:
        """A mutation of the best of the sample, the first of equals; without one, at random."""
        rng = self._random(candidate, "child")
        if not sample:
            return Proposal(candidate, self.space.random(rng))
        parent = max(sample, key=self._merit)
        architecture, mutation = self.space.mutate(parent.architecture, rng)
        non_aging = self.settings.algorithm == "non_aging"
        kept = tuple(member.candidate for member in sample) if non_aging else ()
        return Proposal(candidate, architecture, parent.candidate, mutation, kept)

    def add(self, member: Member, sample: Sequence[int] = ()) -> Member | None:
        """Take in the result of a candidate; returns the member that it removes, if any.

        `sample` is that of its proposal.
        """
        self._check_stamp(member.last_trained)
        removed = self.removed_by(member, sample)
        self.members.append(member)
        self.results += 1
        if removed is not None:
            self.members.remove(removed)
        return removed

    def removed_by(self, member: Member, sample: Sequence[int] = ()) -> Member | None:
        """The member that `add` would remove; nothing is changed."""
        if len(self.members) < self.settings.population:
            return None
        if self.settings.algorithm == "elitist":
            return min([*self.members, member], key=self._merit)
        if self.settings.algorithm == "non_aging":
            there = [m for m in self.members if m.candidate in sample]
            # Others' results may have removed all of them, and a random candidate has no sample.
            there = there or self._draw_sample(self._random(member.candidate, "removal"))
            return min(there, key=self._merit)
        return min(self.members, key=lambda member: member.last_trained)

    def refresh(self, candidate: int, fitness: float, last_trained: int) -> Member | None:
        """Take in a retraining; returns the member as it is now, or None if it has left."""
        self._check_stamp(last_trained)
        for place, member in enumerate(self.members):
            if member.candidate == candidate:
                del self.members[place]
                member = replace(member, fitness=fitness, last_trained=last_trained)
                self.members.append(member)
                return member
        return None

    def _draw_sample(self, rng: Random) -> list[Member]:
        if self.settings.replacement:
            return rng.choices(self.members, k=self.settings.sample)
        return rng.sample(self.members, self.settings.sample)

    def _merit(self, member: Member) -> float:
        return member.fitness if self.settings.maximise else -member.fitness

    def _random(self, candidate: int, purpose: str) -> Random:
        return Random(f"{self.settings.seed} {candidate} {purpose}")

    def _check_stamp(self, last_trained: int) -> None:
        if self.members and last_trained <= self.members[-1].last_trained:
            raise ValueError(
                f"last_trained {last_trained} is not after {self.members[-1].last_trained}, the "
                "newest member's: stamps increase with every training"
            )
