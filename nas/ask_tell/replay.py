"""Replay a run from its log, and check that every proposal follows from seed and population."""

import json
from contextlib import closing
from typing import Any

from nas.ask_tell.duplicates import digest_of
from nas.errors import MismatchError, ReplayError
from nas.evolution.evolution import Evolution, Member, Proposal, Settings
from nas.spaces import copies
from nas.spaces.space import Space, decode_stored
from nas.storage.queries import Snapshot
from nas.storage.reader import CandidateRow, Event, Reader


def replay(reader: Reader, space: Space[Any]) -> Evolution:
    """Replay a run from its events alone, and compare it with the tables of its store.

    A running search is replayed up to this moment.

    Args:
        reader: The run's store: `result.reader`, or `search.store`.
        space: The run's space.

    Returns:
        The evolution with the population after the last event.

    Raises:
        TypeError: `reader` is no store.
        ReplayError: A proposal, its canonical form, a tournament or the population differs.
        nas.errors.MismatchError: The run is of a space with another name.

    Example:
        >>> import tempfile, nas
        >>> space = nas.NASBench201Space()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     options = {"population": 2, "sample": 2, "cycles": 4, "folder": folder}
        ...     result = nas.search(space=space, evaluate=sum, **options)
        ...     nas.replay(result.reader, result.space).results
        4
    """
    if not isinstance(reader, Reader):
        raise TypeError(
            f"reader {reader!r}: expected the store of a run; give `result.reader`, or "
            "`search.store`"
        )
    with closing(Snapshot(reader.file)) as snapshot:
        return _Replay(snapshot, space).run()


class _Replay:
    """Rebuild the evolution event by event."""

    def __init__(self, reader: Reader, space: Space[Any]) -> None:
        study = reader.study()
        if study.space != space.name:
            raise MismatchError(
                f"{reader.path} holds a search of the space {study.space!r}, but the given one is "
                f"{space.name!r}: give the space of the run"
            )
        settings = dict(study.settings)
        settings.pop("cache")
        self.reader, self.space = reader, space
        self.evolution = Evolution(space, Settings(**settings))
        self._samples: dict[int, list[Member]] = {}  # by tournament without a child
        self._pending: dict[int, Proposal] = {}  # by candidate

    def run(self) -> Evolution:
        for event in self.reader.events():
            if event.kind == "reject" and event.candidate in self._pending:
                del self._pending[event.candidate]
            elif event.kind in ("propose", "reject"):  # old runs reject instead of proposing
                self._propose(event)
            elif event.kind == "tournament":
                self._draw_sample(event)
            elif event.kind == "retrain":
                self._retrain(event)
            elif event.kind in ("result", "answer"):
                self._add(event)
            elif event.kind == "fail":
                del self._pending[event.candidate or 0]
            elif event.kind == "skip":
                self._samples.pop(event.candidate or 0, None)
        stored = [(row.id, row.fitness) for row in self.reader.population()]
        replayed = [(member.candidate, member.fitness) for member in self.evolution.members]
        _compare("population", stored, replayed)
        return self.evolution

    def _propose(self, event: Event) -> None:
        row = self._row(event)
        sample = self._samples.pop(row.id, None)
        if sample is None:
            proposal = self.evolution.propose(row.id)
        else:
            proposal = self.evolution.child(row.id, sample)
        text = self.space.encode(copies.own(proposal.architecture))
        stored = (row.architecture, row.parent, row.mutation)
        _compare(f"candidate {row.id}", stored, (text, proposal.parent, proposal.mutation))
        digest = digest_of(self.space.canonical(copies.own(proposal.architecture)))
        _compare(f"digest of candidate {row.id}'s canonical form", row.canonical, digest)
        if event.kind == "propose":
            self._pending[row.id] = proposal

    def _draw_sample(self, event: Event) -> None:
        sample = self.evolution.tournament(event.candidate or 0)
        stored = [member[:3] for member in json.loads(event.detail or "[]")]
        replayed = [[m.candidate, m.fitness, m.last_trained] for m in sample]
        _compare(f"tournament {event.candidate}", stored, replayed)
        self._samples[event.candidate or 0] = sample

    def _retrain(self, event: Event) -> None:
        row = self._row(event)
        architecture = decode_stored(self.space, row.architecture)
        fitness = event.fitness or 0.0
        self.evolution.refresh(row.id, fitness, event.seq)
        evaluation = next(self.reader.evaluations("id = ?", event.evaluation))
        sample = self._samples[evaluation.tournament or 0]
        for index, member in enumerate(sample):
            if member.candidate == row.id:
                sample[index] = Member(row.id, architecture, fitness, member.last_trained)

    def _add(self, event: Event) -> None:
        row = self._row(event)
        proposal = self._pending.pop(row.id)
        member = Member(row.id, proposal.architecture, event.fitness or 0.0, event.seq)
        self.evolution.add(member, proposal.sample)

    def _row(self, event: Event) -> CandidateRow:
        assert event.candidate is not None
        return self.reader.candidate(event.candidate)


def _compare(name: str, stored: Any, replayed: Any) -> None:
    if stored != replayed:
        raise ReplayError(f"{name}: {stored} in the store, {replayed} by the log")
