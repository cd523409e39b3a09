"""Run a search on a simulated clock: hours of asynchronous workers in a second.

It drives anything with `ask` and `report`: a `nas.Search`, or a `StorelessLoop` for statistics over
many seeds.
"""

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from nas.evaluators import evaluator
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Evolution, Member, Proposal
from nas.spaces import copies


class OpenLoop(Protocol):
    """Hand out jobs and take their outcomes, as `nas.Search` does."""

    def ask(self) -> Job | None:
        """Return the next job, or None if there is none now."""
        ...

    def report(self, job: Job, outcome: Outcome) -> None:
        """Take the outcome of a job."""
        ...


class StorelessLoop:
    """Run an evolution without a store and a cache; a job that fails is repeated."""

    def __init__(self, evolution: Evolution, cycles: int) -> None:
        self.evolution, self.cycles = evolution, cycles
        self._asked, self._reported = 0, 0
        self._to_repeat: list[Job] = []
        self._proposals: dict[int, Proposal] = {}  # by pending candidate

    def ask(self) -> Job | None:
        """Return the next job, or None after `cycles` candidates."""
        if self._to_repeat:
            return self._to_repeat.pop()
        if self._asked == self.cycles:
            return None
        number, self._asked = self._asked, self._asked + 1
        proposal = self.evolution.propose(number)
        self._proposals[number] = proposal
        seed = evaluator.job_seed(self.evolution.settings.seed, number)
        return Job(number, number, copies.own(proposal.architecture), seed)

    def report(self, job: Job, outcome: Outcome) -> None:
        """Add a result to the population, or repeat the job."""
        if outcome.fitness is None:
            kept = self._proposals[job.candidate].architecture
            self._to_repeat.append(replace(job, architecture=copies.own(kept)))
            return
        self._reported += 1
        proposal = self._proposals.pop(job.candidate)
        member = Member(job.candidate, proposal.architecture, outcome.fitness, self._reported)
        self.evolution.add(member, proposal.sample)


class FinishedJob(NamedTuple):
    """Hold a job that has ended."""

    at_s: float  # seconds from the start
    job: Job
    outcome: Outcome


def simulate(
    loop: OpenLoop,
    work: Callable[[Job], tuple[Outcome, float]],
    *,
    slots: int = 1,
    synchronous: bool = False,
    max_jobs: int | None = None,
) -> list[FinishedJob]:
    """Run a search on a simulated clock and return its jobs in the order of their ends.

    Args:
        loop: What hands out jobs.
        work: Returns a job's outcome and how many seconds it takes.
        slots: Number of workers.
        synchronous: Whether a worker waits until all are free, as in an algorithm with
            generations. Otherwise it takes a new job as soon as it is free.
        max_jobs: Number of jobs to run; None for all.
    """
    finished: list[FinishedJob] = []
    running: list[tuple[float, int, Job, Outcome]] = []  # a heap by time of the end
    now, count = 0.0, 0
    while True:
        while len(running) < slots and count != max_jobs and (job := loop.ask()) is not None:
            outcome, seconds = work(job)
            heapq.heappush(running, (now + seconds, count, job, outcome))
            count += 1
        if not running:
            return finished
        while running:
            now, _, job, outcome = heapq.heappop(running)
            loop.report(job, outcome)
            finished.append(FinishedJob(now, job, outcome))
            if not synchronous:
                break
