"""Hold what an open search knows besides its store: the population, and what is pending."""

from collections import deque
from collections.abc import Iterable

from nas.ask_tell import pending
from nas.ask_tell.duplicates import CachedResult, Duplicates
from nas.ask_tell.leases import Leases, is_same_work
from nas.ask_tell.limits import LimitCheck
from nas.ask_tell.pending import Tournament
from nas.ask_tell.trained_values import WeightFiles
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Member, Settings
from nas.spaces.space import Space
from nas.storage.writer import Store


class Memory:
    """Hold the state of an open search, read from its store.

    Attributes:
        queue: Jobs to start, without a number of the evaluation.
        pending: Candidates without a result, by number.
        tournaments: Tournaments whose members are trained again, by the candidate to be proposed.
        next_candidate: Number of the next proposal.
        next_evaluation: Number of the next evaluation.
        evaluated: Number of evaluations with a fitness.
        best_fitness: The best fitness, or None.
        is_closed: Whether the store is closed.
    """

    def __init__(
        self,
        store: Store,
        space: Space,
        settings: Settings,
        limit_check: LimitCheck,
        *,
        cache: int,
        lease_s: float | None,
        compare: str | None,
    ) -> None:
        self.store, self.space, self.settings = store, space, settings
        self.limit_check, self.compare = limit_check, compare
        self.leases = Leases(lease_s)
        self.weight_files = WeightFiles(store, settings.fitness_policy)
        self.duplicates = Duplicates(store, cache)
        self.evolution = pending.restore_evolution(store, space, settings)
        self.queue: deque[Job] = deque()
        self.pending = pending.restore_candidates(store, space)
        self.tournaments: dict[int, Tournament] = {}
        self.next_candidate, self.next_evaluation = store.next_numbers()
        self.evaluated = store.counts().evaluations
        self.is_closed = False
        self.find_best()

    def find_best(self) -> None:
        """Read the best fitness from the store."""
        self.best_fitness = next((row.fitness for row in self.store.ranked()), None)

    def rivals(self, candidate: int) -> tuple[float, ...]:
        """Return the metric to compare by, of the members at the candidate's proposal."""
        return self.store.rivals(candidate, self.compare) if self.compare else ()

    def write_result(self, event: int, number: int, result: Outcome | CachedResult) -> Member:
        """Write, within a change, that a candidate joins the population; return the member."""
        candidate, fitness = self.pending[number], result.fitness or 0.0
        member = Member(number, candidate.architecture, fitness, event)
        removed = self.evolution.removed_by(member, candidate.sample)
        self.store.set_candidate(
            number,
            state="done",
            fitness=fitness,
            metrics={**candidate.metrics, **result.metrics},
            last_trained=event,
            trained_values=result.trained_values,
        )
        if removed:
            self.store.set_candidate(removed.candidate, removed=event)
        return member

    def add_member(self, member: Member) -> None:
        """Add a member after `write_result`: memory changes after the store."""
        self.evolution.add(member, self.pending.pop(member.candidate).sample)
        if self.best_fitness is None or self.settings.better(member.fitness, self.best_fitness):
            self.best_fitness = member.fitness

    def end_job(self, job: Job, others: Iterable[int] = ()) -> None:
        """Forget a job that has ended, `others` with the same work, and queued repetitions."""
        self.leases.end(job.evaluation, *others)
        if self.queue:
            self.queue = deque(each for each in self.queue if not is_same_work(each, job))

    def remove_weights(self) -> None:
        """Remove the files of trained weights that are no longer needed."""
        running = self.leases.running
        self.weight_files.remove_unneeded(self.pending, self.tournaments, running)
