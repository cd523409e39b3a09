"""A search on a clock that is simulated: hours of asynchronous workers in a second.

What it drives is anything with `ask` and `report`: a `Search`, or a `Loop` without a store, which
is for statistics over many seeds.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple, Protocol

from nas.evaluators import evaluator
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Evolution, Member


class OpenLoop(Protocol):
    """The open loop of `nas.Search`."""

    def ask(self) -> Job | None:
        """The next job, if there is one now."""
        ...

    def report(self, job: Job, outcome: Outcome) -> None:
        """What came of it."""
        ...


class StorelessLoop:
    """The open loop around an evolution, without a store or a cache; what fails is done again."""

    def __init__(self, evolution: Evolution, cycles: int) -> None:
        self.evolution, self.cycles = evolution, cycles
        self._asked, self._reported = 0, 0
        self._again: list[Job] = []
        self._samples: dict[int, tuple[int, ...]] = {}  # by candidate, of those under way

    def ask(self) -> Job | None:
        """The next job, if there is one."""
        if self._again:
            return self._again.pop()
        if self._asked == self.cycles:
            return None
        number, self._asked = self._asked, self._asked + 1
        proposal = self.evolution.propose(number)
        self._samples[number] = proposal.sample
        seed = evaluator.job_seed(self.evolution.settings.seed, number)
        return Job(number, number, proposal.architecture, seed)

    def report(self, job: Job, outcome: Outcome) -> None:
        """A result, or else the job is done again."""
        if outcome.fitness is None:
            self._again.append(job)
            return
        self._reported += 1
        member = Member(job.candidate, job.architecture, outcome.fitness, self._reported)
        self.evolution.add(member, self._samples.pop(job.candidate))


class FinishedJob(NamedTuple):
    """A job that has ended: when, in seconds from the start, and how."""

    at_s: float
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
    """Every job, or the first `most`, in order of their ends. `work` gives outcome and seconds.

    Of `slots` workers each takes a new job as soon as it is free; `synchronous` ones wait until all
    are, as in an algorithm of generations.
    """
    done: list[FinishedJob] = []
    running: list[tuple[float, int, Job, Outcome]] = []
    now, count = 0.0, 0
    while True:
        while len(running) < slots and count != max_jobs and (job := loop.ask()) is not None:
            outcome, seconds = work(job)
            heapq.heappush(running, (now + seconds, count, job, outcome))
            count += 1
        if not running:
            return done
        while running:
            now, _, job, outcome = heapq.heappop(running)
            loop.report(job, outcome)
            done.append(FinishedJob(now, job, outcome))
            if not synchronous:
                break
