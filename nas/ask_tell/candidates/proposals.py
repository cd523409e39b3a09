"""Propose candidates, after the retrainings of their tournaments, and skip what a space cannot."""

import json
import warnings
from collections.abc import Sequence

from nas.ask_tell import pending
from nas.ask_tell.candidates.memory import Memory
from nas.ask_tell.candidates.schedule import Schedule
from nas.ask_tell.duplicates import digest_of
from nas.ask_tell.limits import FailureCounter
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.evaluators import outcomes
from nas.evolution.evolution import Member
from nas.spaces import copies, returned


class Proposals:
    """Write proposals and tournaments, and schedule what follows from them."""

    def __init__(self, memory: Memory, schedule: Schedule, max_failures: int) -> None:
        self._memory, self._schedule = memory, schedule
        self._counter = FailureCounter(max_failures, "proposals")

    @property
    def open(self) -> int:
        """Count the candidates with a result, and those that may get one."""
        memory = self._memory
        return memory.evolution.results + len(memory.pending) + len(memory.tournaments)

    def advance(self) -> None:
        """Propose the next candidate, or begin the tournament that comes before it."""
        memory, number = self._memory, self._memory.next_candidate
        sample = [] if memory.evolution.is_random else memory.evolution.tournament(number)
        if memory.settings.fitness_policy == "stored" or not sample:
            self.propose(number, sample)
            return
        inherit = {m.candidate: memory.weight_files.of_candidate(m.candidate) for m in sample}
        tournament = Tournament(sample, set(inherit), inherit)
        with memory.store.change("tournament", number, detail=tournament.event_detail):
            pass
        memory.next_candidate = number + 1
        self._schedule.queue_retrainings(number, tournament)

    def propose(self, number: int, sample: Sequence[Member]) -> None:
        """Write the proposal that follows from a sample, and schedule its candidate."""
        memory, space = self._memory, self._memory.space
        method = "mutate" if sample else "random"
        try:
            proposal = memory.evolution.child(number, sample)
            architecture, drawn = proposal.architecture, proposal.sample
            method = "encode"
            text = returned.text(method, space.encode(copies.own(architecture)))
            method = "canonical"
            canonical = returned.text(method, space.canonical(copies.own(architecture)))
            digest = digest_of(canonical)
        except Exception as error:  # the user's own code may raise anything
            self._skip(number, f"{method} of the space raised {outcomes.describe(error)}")
            return
        inherit = memory.weight_files.of_candidate(proposal.parent)
        detail = json.dumps(drawn) if drawn else None
        with memory.store.change("propose", number, detail=detail) as event:
            memory.store.add_candidate(
                proposal,
                event,
                architecture=text,
                canonical=digest,
                state="open",
                metrics=None,
                inherit=inherit,
            )
        memory.next_candidate = max(memory.next_candidate, number + 1)
        self._counter.reset()
        memory.pending[number] = PendingCandidate(architecture, digest, inherit, {}, drawn)
        self._schedule.schedule([number])

    def _skip(self, number: int, reason: str) -> None:
        """Give up a proposal that the space cannot make; the next one draws again."""
        with self._memory.store.change("skip", number, detail=reason):
            pass
        self._memory.next_candidate = max(self._memory.next_candidate, number + 1)
        warnings.warn(f"proposal {number} is skipped: {reason}", RuntimeWarning, stacklevel=2)
        self._counter.count(f"proposal {number}: {reason}")

    def record_retraining(self, number: int, candidate: int, fitness: float | None) -> None:
        """Record a retraining in its tournament; after the last one the best gets its child.

        Args:
            number: The candidate to be proposed.
            candidate: The member that was trained again.
            fitness: Its new fitness; None if the training was given up.
        """
        tournament = self._memory.tournaments[number]
        tournament.record(candidate, fitness)
        if not tournament.untrained:
            del self._memory.tournaments[number]
            self.propose(number, tournament.sample)

    def restore(self) -> None:
        """Queue what the last driver left pending, ordered by number."""
        memory = self._memory
        self._schedule.schedule(memory.pending)
        for number, tournament in pending.restore_tournaments(memory.store, memory.space).items():
            if tournament.untrained:
                self._schedule.queue_retrainings(number, tournament)
            else:
                self.propose(number, tournament.sample)
        self._schedule.count_attempts()
        memory.remove_weights()
