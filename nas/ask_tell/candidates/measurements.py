"""Measure queued candidates, and reject those that are beyond a limit."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from nas.ask_tell.candidates.memory import Memory
from nas.ask_tell.candidates.results import Results
from nas.ask_tell.candidates.schedule import Schedule
from nas.ask_tell.limits import Measures
from nas.ask_tell.pending import PendingCandidate
from nas.evaluators.evaluator import Job


class Measurements:
    """Let a job pass if its architecture keeps the limits.

    `unlocked` is a context in which other threads ask and tell: a measurement may take minutes.
    """

    def __init__(
        self,
        memory: Memory,
        schedule: Schedule,
        results: Results,
        unlocked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._memory, self._schedule, self._results = memory, schedule, results
        self._unlocked = unlocked

    def are_kept(self, job: Job) -> bool:
        """Return whether a queued job may start; write it if it is rejected, or not measurable."""
        candidate = self._memory.pending.get(job.candidate)
        limits = self._memory.limit_check.limits
        if job.tournament is not None or candidate is None or not limits:
            return True
        measures = self._measure(job, candidate)
        if self._memory.is_closed:  # meanwhile; the next driver measures again
            return False
        self._memory.pending[job.candidate] = candidate._replace(metrics=measures.metrics)
        if measures.failure is not None:
            self._results.end_failure(self._schedule.start(job), measures.failure)
        elif measures.exceeded is not None:
            self._reject(job.candidate, measures.exceeded)
        return measures.failure is None and measures.exceeded is None

    def _measure(self, job: Job, candidate: PendingCandidate) -> Measures:
        """Return what the limits say, from an equal network if it was measured."""
        memory = self._memory
        known = {**memory.duplicates.metrics(candidate.digest), **candidate.metrics}
        if memory.limit_check.is_measured(known):
            return Measures(memory.limit_check.measured_in(known))
        try:
            with self._unlocked():
                return memory.limit_check.measure(candidate.architecture)
        except BaseException:
            memory.queue.appendleft(job)
            raise

    def _reject(self, number: int, exceeded: str) -> None:
        """Give up a candidate that is beyond a limit."""
        memory, candidate = self._memory, self._memory.pending[number]
        with memory.store.change("reject", number, detail=exceeded):
            memory.store.set_candidate(number, state="rejected", metrics=candidate.metrics)
        del memory.pending[number]
        memory.limit_check.count_rejection(exceeded)
        self._schedule.schedule(memory.duplicates.finish(candidate.digest))
