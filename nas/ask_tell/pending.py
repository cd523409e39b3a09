"""Hold what a search has pending, and restore it from the store after a driver has ended."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from nas.evolution.evolution import Evolution, Member, Settings
from nas.spaces.space import Space, decode_stored
from nas.storage.reader import CandidateRow, Reader


class PendingCandidate(NamedTuple):
    """Hold a candidate without a result."""

    architecture: Any
    digest: str  # of its canonical form
    inherit: str | None  # weights of its parent, at the time of its proposal
    metrics: dict[str, float]  # measured by the limits
    sample: tuple[int, ...]  # see `nas.evolution.evolution.Proposal`


class Tournament(NamedTuple):
    """Hold members that are trained again before the best of them gets a child."""

    sample: list[Member]  # with the new fitness of those that have been trained
    untrained: set[int]  # candidates that are still to be trained
    inherit: dict[int, str | None]  # for each candidate, the weights that its training starts from

    @property
    def event_detail(self) -> str:
        """Return the detail of the tournament's event, before any member is trained again."""
        return json.dumps(
            [
                [m.candidate, m.fitness, m.last_trained, self.inherit[m.candidate]]
                for m in self.sample
            ]
        )

    def record(self, candidate: int, fitness: float | None) -> None:
        """Record a retraining; without a fitness the member keeps the one it has."""
        self.untrained.discard(candidate)
        for index, member in enumerate(self.sample):
            if member.candidate == candidate and fitness is not None:
                self.sample[index] = replace(member, fitness=fitness)


def restore_evolution(reader: Reader, space: Space[Any], settings: Settings) -> Evolution:
    """Return an evolution with the population of the store."""
    evolution = Evolution(space, settings)
    evolution.members = [_member(space, row) for row in reader.population()]
    evolution.results = reader.counts().results
    return evolution


def restore_candidates(reader: Reader, space: Space[Any]) -> dict[int, PendingCandidate]:
    """Return the pending candidates by number, in order."""
    pending = {}
    for row in reader.candidates("state = 'open'"):
        (proposed,) = reader.events(row.proposed - 1, limit=1)
        sample = tuple(json.loads(proposed.detail or "[]"))
        architecture = decode_stored(space, row.architecture)
        pending[row.id] = PendingCandidate(
            architecture, row.canonical, row.inherit, row.metrics, sample
        )
    return pending


def restore_tournaments(reader: Reader, space: Space[Any]) -> dict[int, Tournament]:
    """Return the tournaments without a child by number; some may have nothing left to train."""
    tournaments: dict[int, Tournament] = {}

    def read(number: int) -> Any:
        return decode_stored(space, reader.candidate(number).architecture)

    for tournament_of, drawn in reader.open_tournaments():
        sample = [
            Member(number, read(number), fitness, trained) for number, fitness, trained, *_ in drawn
        ]
        # Stores of version 1 do not have the weights.
        inherit = {number: weights[0] for number, _, _, *weights in drawn if weights}
        tournament = Tournament(sample, {m.candidate for m in sample}, inherit)
        for row in reader.evaluations("tournament = ? AND outcome = 'ok'", tournament_of):
            tournament.record(row.candidate, row.fitness)
        for candidate in reader.kept_members(tournament_of):
            tournament.record(candidate, None)
        tournaments[tournament_of] = tournament
    return tournaments


def weights_to_inherit(
    candidates: Iterable[PendingCandidate], tournaments: Iterable[Tournament]
) -> set[str | None]:
    """Return the weights from which pending trainings start."""
    retrained = {weights for each in tournaments for weights in each.inherit.values()}
    return retrained | {candidate.inherit for candidate in candidates}


def _member(space: Space[Any], row: CandidateRow) -> Member:
    assert row.fitness is not None and row.last_trained is not None  # members have both
    return Member(row.id, decode_stored(space, row.architecture), row.fitness, row.last_trained)
