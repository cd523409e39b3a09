"""Run a search as an open loop: `ask` returns a job to train, `tell` takes its fitness.

    search = nas.Search(space=nas.NASNetSpace(), name="first", population=100, sample=25)
    while (job := search.ask()) is not None:
        search.tell(job, accuracy(job.architecture))

Any number of jobs may run at once; `tell` takes them in any order, from any thread. Every change is
written to the store before memory changes, so that a search of the same name resumes where the last
driver stopped. A candidate passes through these methods:

    _advance --> _propose --> rejected by a limit
       |            |
       |            +--> _schedule --> answered by the cache ------------> _add_member
       |                     |   ^                                            ^
       |                     |   +-- a duplicate that waited                  |
       |                     +--> _queue --> ask --> job --> tell, report ----+
       |                            ^                           |
       +--> tournament: retrainings +---- retry after a failure +
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas import keywords
from nas.ask_tell import pending, reopening, trained_values
from nas.ask_tell.duplicates import CachedResult, Duplicates, digest_of
from nas.ask_tell.limits import FailureCounter, Limit, LimitCheck, Retries
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome, job_seed
from nas.evolution.evolution import Member, Proposal, Settings
from nas.spaces import space as spaces


class Search:
    """Run regularized evolution with a store, a cache, limits and retries, as an open loop.

    Args:
        space: The search space, or the name of a built-in one: nasnet, nasbench201.
        name: Name of the run; its folder is FOLDER/NAME. Default: "search".
        folder: Folder of runs, on a local disk. Default: "runs".
        cycles: Number of candidates with a fitness at which the search is over. Default: 1000.
        target: Fitness that ends the search earlier. Default: none.
        cache: Whether duplicates are evaluated only once, or the number of evaluations after which
            their mean answers. Default: True.
        limits: Architectures beyond these are rejected before training. Default: none.
        retries: Number of retries for each kind of failure. Default: `nas.Retries()`.
        max_failures: Number of failures in a row that end the search. Default: 10.
        compare: Metric of the population's members that jobs get as `Job.rivals`. Default: none.
        setup: Space, evaluator and limits, pickled, for `Result.resume`. Default: none.
        evaluator: What the fitness depends on (`nas.evaluators.evaluator.identity_of`); a store
            with other values is refused. Default: unknown, which fits every store.
        other_evaluator: Whether the store may have another evaluator. Default: False.
        **settings: Fields of `nas.Settings`: population, sample, seed, maximise, replacement,
            algorithm, fitness_policy.

    Attributes:
        store: The run's store, to read from.
        evolution: The population.
        best_fitness: The best fitness so far, or None.

    Raises:
        ValueError: An argument is not legal.
        nas.errors.MismatchError: The folder holds another search.
        nas.errors.SearchInUseError: Another driver has the store open.
        nas.errors.NetworkFileSystemError: The folder is on a network file system.

    Example:
        >>> import tempfile, nas
        >>> options = {"population": 2, "sample": 2, "cycles": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with nas.Search(space="nasbench201", folder=folder, **options) as search:
        ...         while (job := search.ask()) is not None:
        ...             search.tell(job, {"fitness": sum(job.architecture), "epochs": 20})
        ...         search.is_over
        True
    """

    def __init__(
        self,
        *,
        space: Any,
        name: str = "search",
        folder: str | Path = "runs",
        cycles: int = 1000,
        target: float | None = None,
        cache: bool | int = True,
        limits: Sequence[Limit] = (),
        retries: Retries | None = None,
        max_failures: int = 10,
        compare: str | None = None,
        setup: bytes | None = None,
        evaluator: Mapping[str, Any] | None = None,
        other_evaluator: bool = False,
        **settings: Any,
    ) -> None:
        keywords.check_names("nas.Search", settings, argument_names())
        self.space, self.settings = spaces.as_space(space), Settings(**settings)
        reopening.check_arguments(self.settings, cycles, cache, max_failures)
        self.cycles, self.target, self.limit_check = cycles, target, LimitCheck(limits)
        self.retries, self.failure_counter = retries or Retries(), FailureCounter(max_failures)
        self.store = reopening.open_store(
            Path(folder) / name,
            name,
            self.space,
            {**self.settings.to_dict(), "cache": int(cache)},
            [limit.identity for limit in self.limit_check.limits],
            setup,
            evaluator,
            other_evaluator,
        )
        self.compare = compare
        self.weight_files = trained_values.WeightFiles(self.store, self.settings.fitness_policy)
        self._lock = threading.RLock()
        self.duplicates = Duplicates(self.store, int(cache))
        self._queue: deque[Job] = deque()  # without a number of the evaluation
        self._running: dict[int, Job] = {}  # by evaluation
        self._pending: dict[int, PendingCandidate] = {}  # by candidate
        self._unscheduled: deque[int] = deque()  # candidates that are pending
        self._tournaments: dict[int, Tournament] = {}  # by the candidate to be proposed
        try:
            self.evolution = pending.restore_evolution(self.store, self.space, self.settings)
            self._restore()
        except BaseException:
            self.close()
            raise

    def ask(self, until: Callable[[], bool] = lambda: False) -> Job | None:
        """Return the next job.

        The cache may answer many candidates before one is to be evaluated.

        Args:
            until: Called between candidates; if it returns True, `ask` returns None. Default: a
                function that returns False.

        Returns:
            The job, or None if there is none now: the search is over, or it waits for reports of
            running jobs.

        Raises:
            nas.FailuresError: The limits have rejected 10,000 candidates in a row.
        """
        with self._lock:
            self._schedule_all()
            while not self.is_over and not until():
                if self._queue:
                    return self._start(self._queue.popleft())
                proposed = self.evolution.results + len(self._pending) + len(self._tournaments)
                if proposed >= self.cycles:
                    return None
                self._advance()
        return None

    def tell(self, job: Job, fitness: float | Mapping[str, Any]) -> None:
        """Take the fitness of a job.

        A job that was told before, or that belongs to an earlier driver, changes nothing.

        Args:
            job: What `ask` returned.
            fitness: A number, or a dict with `fitness`, other metrics, and `trained_values` (a text
                that says where the trained weights are). A fitness that is not finite is a failure.

        Raises:
            nas.errors.ReturnError: It is neither.
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        self.report(job, outcomes.as_outcome(fitness, job))

    def report(self, job: Job, outcome: Outcome) -> None:
        """Take the outcome of a job, which may be a failure.

        Args:
            job: What `ask` returned.
            outcome: Its outcome, of kind `ok` or one of `nas.evaluators.evaluator.FAILURES`.

        Raises:
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        with self._lock:
            if job.evaluation not in self._running:
                with self.store.change("late", job.candidate, evaluation=job.evaluation):
                    return
            self.weight_files.check_written(outcome)
            if outcome.kind != "ok":
                self._end_failure(job, outcome)
            elif job.tournament is None:
                self._end_result(job, outcome)
            else:
                self._end_retraining(job, outcome)
            self.weight_files.remove_unneeded(self._pending, self._tournaments, self._running)

    @property
    def is_over(self) -> bool:
        """Return whether there are enough results, or one is as good as the target."""
        if self.evolution.results >= self.cycles:
            return True
        if self.target is None or self.best_fitness is None:
            return False
        return not self.settings.better(self.target, self.best_fitness)

    def close(self) -> None:
        """Close the store, so that another driver can open it."""
        with self._lock:
            self.store.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- proposals --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Propose the next candidate, or begin the tournament that comes before it."""
        number = self._next
        if self.settings.fitness_policy == "stored" or self.evolution.is_random:
            self._propose(self.evolution.propose(number))
            return
        sample = self.evolution.tournament(number)
        inherit = {m.candidate: self.weight_files.of_candidate(m.candidate) for m in sample}
        tournament = Tournament(sample, set(inherit), inherit)
        with self.store.change("tournament", number, detail=tournament.event_detail):
            pass
        self._next = number + 1
        self._queue_retrainings(number, tournament)

    def _queue_retrainings(self, number: int, tournament: Tournament) -> None:
        """Queue jobs for the members that have not been trained again."""
        self._tournaments[number] = tournament
        members = {m.candidate: m for m in tournament.sample if m.candidate in tournament.untrained}
        for candidate, member in members.items():
            if candidate not in tournament.inherit:  # as in stores of version 1
                tournament.inherit[candidate] = self.weight_files.of_candidate(candidate)
            seed = job_seed(self.settings.seed, candidate, number)
            start = tournament.inherit[candidate]
            self._queue.append(Job(0, candidate, member.architecture, seed, 1, number, start))

    def _propose(self, proposal: Proposal) -> None:
        """Write a proposal; schedule its candidate if it keeps the limits."""
        number, architecture, parent, _, sample = proposal
        metrics, exceeded = self.limit_check.measure(architecture)
        digest = digest_of(self.space.canonical(architecture))
        detail = exceeded or (json.dumps(sample) if sample else None)
        inherit = self.weight_files.of_candidate(parent)
        kind = "reject" if exceeded else "propose"
        with self.store.change(kind, number, detail=detail) as event:
            self.store.add_candidate(
                proposal,
                event,
                architecture=self.space.encode(architecture),
                canonical=digest,
                state="rejected" if exceeded else "open",
                metrics=metrics,
                inherit=inherit,
            )
        self._next = max(self._next, number + 1)
        if exceeded:
            self.limit_check.count_rejection(exceeded)
            return
        self._pending[number] = PendingCandidate(architecture, digest, inherit, metrics, sample)
        self._schedule_all([number])

    def _schedule_all(self, more: Iterable[int] = ()) -> None:
        """Schedule these candidates, after those that an error in writing has left unscheduled."""
        self._unscheduled.extend(more)
        while self._unscheduled:
            self._schedule(self._unscheduled[0])
            self._unscheduled.popleft()

    def _schedule(self, number: int) -> None:
        """Answer a candidate from the cache, let it wait for a duplicate, or queue its job."""
        candidate = self._pending[number]
        seed = job_seed(self.settings.seed, number)
        rivals = self._rivals(number)
        answer = self.duplicates.look_up(candidate.digest, number)
        if answer == "evaluate":
            job = Job(
                evaluation=0,
                candidate=number,
                architecture=candidate.architecture,
                seed=seed,
                inherit=candidate.inherit,
                rivals=rivals,
            )
            self._queue.append(job)
        elif answer != "wait":
            with self.store.change("answer", number, fitness=answer.fitness) as event:
                member = self._write_result(event, number, answer)
                self.store.set_candidate(number, answered_by=answer.evaluated)
            self._add_member(member)

    def _rivals(self, candidate: int) -> tuple[float, ...]:
        """Return the metric to compare by, of the members at the candidate's proposal."""
        return self.store.rivals(candidate, self.compare) if self.compare else ()

    def _start(self, job: Job) -> Job:
        """Give a queued job its number, write it, and return it."""
        inherit = self.weight_files.if_exists(job.inherit)
        job = replace(job, evaluation=self._next_evaluation, inherit=inherit)
        with self.store.change("start", job.candidate, evaluation=job.evaluation):
            self.store.add_evaluation(job)
        self._next_evaluation += 1
        self._running[job.evaluation] = job
        return job

    # --- outcomes ---------------------------------------------------------------------------------

    def _end_result(self, job: Job, outcome: Outcome) -> None:
        """Add a candidate with its fitness to the population."""
        digest = self._pending[job.candidate].digest
        with self.store.change(
            "result", job.candidate, evaluation=job.evaluation, fitness=outcome.fitness
        ) as event:
            self.store.end_evaluation(job, outcome)
            member = self._write_result(event, job.candidate, outcome)
        self._add_member(member)
        del self._running[job.evaluation]
        self.failure_counter.reset()
        self._schedule_all(self.duplicates.finish(digest))

    def _write_result(self, event: int, number: int, result: Outcome | CachedResult) -> Member:
        """Write, within a change, that a candidate joins the population; return the member."""
        candidate, fitness = self._pending[number], result.fitness or 0.0
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

    def _add_member(self, member: Member) -> None:
        """Change the memory in the same way, after the store."""
        self.evolution.add(member, self._pending.pop(member.candidate).sample)
        if self.best_fitness is None or self.settings.better(member.fitness, self.best_fitness):
            self.best_fitness = member.fitness

    def _end_retraining(self, job: Job, outcome: Outcome) -> None:
        """Give a member that was trained again its new fitness."""
        number, fitness = job.candidate, outcome.fitness or 0.0
        measured = self.limit_check.measured_in(self.store.candidate(number).metrics)
        change = self.store.change("retrain", number, evaluation=job.evaluation, fitness=fitness)
        with change as event:
            self.store.end_evaluation(job, outcome)
            self.store.set_candidate(
                number,
                fitness=fitness,
                last_trained=event,
                metrics={**measured, **outcome.metrics},
                trained_values=outcome.trained_values,
            )
        self.evolution.refresh(number, fitness, event)
        del self._running[job.evaluation]
        self.failure_counter.reset()
        self.best_fitness = next((row.fitness for row in self.store.ranked()), None)
        self._record_in_tournament(job, fitness)

    def _record_in_tournament(self, job: Job, fitness: float | None) -> None:
        """Record the end of a retraining; after the last one the best member gets its child."""
        assert job.tournament is not None
        tournament = self._tournaments[job.tournament]
        tournament.record(job.candidate, fitness)
        if not tournament.untrained:
            del self._tournaments[job.tournament]
            self._propose(self.evolution.child(job.tournament, tournament.sample))

    def _end_failure(self, job: Job, outcome: Outcome) -> None:
        """Retry a failed job, or give it up after as many retries as its kind of failure has."""
        failures_before = self.store.attempts(job.candidate, job.tournament, outcome.kind)
        retry = failures_before < getattr(self.retries, outcome.kind)
        event = "failure" if retry or job.tournament is not None else "fail"
        with self.store.change(
            event, job.candidate, evaluation=job.evaluation, detail=outcome.kind
        ):
            self.store.end_evaluation(job, outcome)
            if event == "fail":
                self.store.set_candidate(job.candidate, state="failed")
        del self._running[job.evaluation]
        if retry:
            self._queue.appendleft(replace(job, attempt=job.attempt + 1))
        elif job.tournament is not None:
            self._record_in_tournament(job, None)
        else:
            failed = self._pending.pop(job.candidate)
            self._schedule_all(self.duplicates.finish(failed.digest))
        self.failure_counter.count(f"candidate {job.candidate}, by {outcome.kind}: {outcome.error}")

    # --- resuming ---------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Queue what the last driver left pending, ordered by number."""
        self._next, self._next_evaluation = self.store.next_numbers()
        self.best_fitness = next((row.fitness for row in self.store.ranked()), None)
        self._pending = pending.restore_candidates(self.store, self.space)
        self._schedule_all(self._pending)
        for number, tournament in pending.restore_tournaments(self.store, self.space).items():
            if tournament.untrained:
                self._queue_retrainings(number, tournament)
            else:
                self._propose(self.evolution.child(number, tournament.sample))
        self._queue = deque(
            replace(job, attempt=1 + self.store.attempts(job.candidate, job.tournament))
            for job in self._queue
        )
        self.weight_files.remove_unneeded(self._pending, self._tournaments, self._running)


def argument_names() -> list[str]:
    """Return the names of the arguments of `Search`, with those of `nas.Settings`."""
    return [*keywords.names_of(Search), *keywords.names_of(Settings)]
