"""A run gone through again from its log, to see that every proposal is the one it had to be."""

import json
from contextlib import closing
from typing import Any

from nas.errors import ReplayError
from nas.evolution.evolution import Evolution, Member, Proposal, Settings
from nas.spaces.space import Space
from nas.storage.queries import Snapshot
from nas.storage.reader import CandidateRow, Event, Reader


def replay(reader: Reader, space: Space[Any]) -> Evolution:
    """The population as of the last event, from the events alone; ReplayError if it is another.

    Also of a search that goes on, as of this moment.
    """
    with closing(Snapshot(reader.path)) as moment:
        return _replay(moment, space)


def _replay(reader: Reader, space: Space[Any]) -> Evolution:
    settings = dict(reader.study().settings)
    settings.pop("cache")
    evolution = Evolution(space, Settings(**settings))
    samples: dict[int, list[Member]] = {}
    made: dict[int, Proposal] = {}  # of those under way
    for event in reader.events():
        if event.kind in ("propose", "reject"):
            row = _row(reader, event)
            proposal = _check_proposal(evolution, row, samples)
            if event.kind == "propose":
                made[row.id] = proposal
        elif event.kind == "tournament":
            samples[event.candidate or 0] = _sample(reader, evolution, event)
        elif event.kind == "retrain":
            _take_again(reader, evolution, event, samples)
        elif event.kind in ("result", "answer"):
            row = _row(reader, event)
            member = Member(row.id, made[row.id].architecture, event.fitness or 0.0, event.seq)
            evolution.add(member, made.pop(row.id).sample)
        elif event.kind == "fail":
            del made[event.candidate or 0]
    there = [(row.id, row.fitness) for row in reader.population()]
    here = [(member.candidate, member.fitness) for member in evolution.members]
    if there != here:
        raise ReplayError(f"population: {there} in the store, {here} by the log")
    return evolution


def _check_proposal(
    evolution: Evolution, row: CandidateRow, samples: dict[int, list[Member]]
) -> Proposal:
    drawn = samples.pop(row.id, None)
    made = evolution.propose(row.id) if drawn is None else evolution.child(row.id, drawn)
    there = (row.architecture, row.parent, row.mutation)
    here = (evolution.space.encode(made.architecture), made.parent, made.mutation)
    if there != here:
        raise ReplayError(f"candidate {row.id}: {there} in the store, {here} by the log")
    return made


def _sample(reader: Reader, evolution: Evolution, event: Event) -> list[Member]:
    sample = evolution.tournament(event.candidate or 0)
    here = [[m.candidate, m.fitness, m.last_trained] for m in sample]
    there = [member[:3] for member in json.loads(event.detail or "[]")]
    if there != here:
        raise ReplayError(f"tournament {event.candidate}: {there} in the store, {here} by the log")
    return sample


def _take_again(
    reader: Reader, evolution: Evolution, event: Event, samples: dict[int, list[Member]]
) -> None:
    row = _row(reader, event)
    architecture, fitness = evolution.space.decode(row.architecture), event.fitness or 0.0
    evolution.refresh(row.id, fitness, event.seq)
    done = next(reader.evaluations("id = ?", event.evaluation))
    sample = samples[done.tournament or 0]
    for place, member in enumerate(sample):
        if member.candidate == row.id:
            sample[place] = Member(row.id, architecture, fitness, member.last_trained)


def _row(reader: Reader, event: Event) -> CandidateRow:
    assert event.candidate is not None
    return reader.candidate(event.candidate)
