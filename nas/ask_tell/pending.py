"""What a search has under way, and how it is found again in the store of a driver that is gone."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from nas.evolution.evolution import Evolution, Member, Settings
from nas.spaces.space import Space
from nas.storage.reader import CandidateRow, Reader


class PendingCandidate(NamedTuple):
    """A candidate without a result."""

    architecture: Any
    digest: str  # digest of its canonical form
    inherit: str | None  # trained values of its parent, as of its proposal
    metrics: dict[str, float]  # of the limits
    sample: tuple[int, ...]  # see `nas.evolution.evolution.Proposal`


class Tournament(NamedTuple):
    """Members that are trained again before the best of them has a child."""

    sample: list[Member]  # with their new fitness, as far as it is known
    untrained: set[int]  # candidates
    inherit: dict[int, str | None]  # by candidate, what its training starts from

    @property
    def event_detail(self) -> str:
        """What its event has, before anything is judged."""
        return json.dumps(
            [
                [m.candidate, m.fitness, m.last_trained, self.inherit[m.candidate]]
                for m in self.sample
            ]
        )

    def record(self, candidate: int, fitness: float | None) -> None:
        """A retraining has ended; without a fitness the member keeps the one it has."""
        self.untrained.discard(candidate)
        for place, member in enumerate(self.sample):
            if member.candidate == candidate and fitness is not None:
                self.sample[place] = replace(member, fitness=fitness)


def restore_evolution(reader: Reader, space: Space[Any], settings: Settings) -> Evolution:
    """With the population that the store has."""
    found = Evolution(space, settings)
    found.members = [_member(space, row) for row in reader.population()]
    found.results = reader.counts().results
    return found


def restore_candidates(reader: Reader, space: Space[Any]) -> dict[int, PendingCandidate]:
    """By number, in order."""
    found = {}
    for row in reader.candidates("state = 'open'"):
        (event,) = reader.events(row.proposed - 1, most=1)
        sample = tuple(json.loads(event.detail or "[]"))
        architecture = space.decode(row.architecture)
        found[row.id] = PendingCandidate(
            architecture, row.canonical, row.inherit, row.metrics, sample
        )
    return found


def restore_tournaments(reader: Reader, space: Space[Any]) -> dict[int, Tournament]:
    """Those without a child as yet, by its number; perhaps with nothing missing any more."""
    found: dict[int, Tournament] = {}
    for number, drawn in reader.open_tournaments():
        sample = [
            Member(c, space.decode(reader.candidate(c).architecture), fitness, stamp)
            for c, fitness, stamp, *_ in drawn
        ]
        inherit = {c: values for c, _, _, *recorded in drawn for values in recorded}
        found[number] = Tournament(sample, {m.candidate for m in sample}, inherit)
        for row in reader.evaluations("tournament = ? AND outcome = 'ok'", number):
            found[number].record(row.candidate, row.fitness)
    return found


def weights_to_inherit(
    open_: Iterable[PendingCandidate], tournaments: Iterable[Tournament]
) -> set[str | None]:
    """The trained values that are to be started from."""
    retrained = {values for found in tournaments for values in found.inherit.values()}
    return retrained | {found.inherit for found in open_}


def _member(space: Space[Any], row: CandidateRow) -> Member:
    assert row.fitness is not None and row.last_trained is not None  # as of all that are done
    return Member(row.id, space.decode(row.architecture), row.fitness, row.last_trained)
