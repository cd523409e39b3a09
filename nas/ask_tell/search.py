"""Run a search as an open loop: `ask` returns a job to train, `tell` takes its fitness.

    search = nas.Search(space=nas.NASNetSpace(), name="first", population=100, sample=25)
    while (job := search.ask()) is not None:
        search.tell(job, accuracy(job.architecture))

Any number of jobs may run at once; `tell` takes them in any order, from any thread. Every change is
written to the store before memory changes, so that a search of the same name resumes where the last
driver stopped. A candidate passes through these methods:

    _advance --> _propose --> _schedule --> answered by the cache -------------> _add_member
       |            |           ^    |                                             ^
       |            v           |    +--> _queue --> ask --> job --> tell, report -+
       |   the space raises:    |           ^         |                |        |
       |   skipped              |           |         v                |        |
       |                        |           |   beyond a limit:        |        |
       |                        |           |   rejected               |        |
       |                        |           +------ retry after a failure       |
       |                        +-------- a duplicate that waited --------------+
       +--> tournament: retrainings, before the proposal
"""

import json
import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas import keywords
from nas.ask_tell import arguments, code_changes, leases, pending, reopening, trained_values
from nas.ask_tell.code_changes import Code
from nas.ask_tell.duplicates import CachedResult, Duplicates, KnownFate, digest_of
from nas.ask_tell.leases import LEASE_S, Leases
from nas.ask_tell.limits import FailureCounter, Limit, LimitCheck, Measures, Retries
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.choices import Direction
from nas.errors import FailuresError
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome, job_seed
from nas.evolution.evolution import Member, Settings
from nas.evolution.length import length
from nas.spaces import copies, returned
from nas.spaces import space as spaces
from nas.storage.run_folder import run_folder


class Search:
    """Run regularized evolution with a store, a cache, limits and retries, as an open loop.

    Args:
        space: The search space, or the name of a built-in one: nasnet, nasbench201.
        name: Name of the run; its folder is FOLDER/NAME. Default: "search".
        folder: Folder of runs, on a local disk. Default: "runs".
        cycles: Number of candidates with a fitness at which the search is over. Answers of the
            cache count too. Default: 1000, or ten times `evaluations`.
        evaluations: Number of evaluations with a fitness at which the search is over. Failures and
            answers of the cache do not count; members that are trained again do. Default: no limit.
        target: Fitness that ends the search earlier. Default: none.
        cache: Whether duplicates are evaluated only once, or the number of evaluations after which
            their mean answers. Default: True.
        limits: Architectures beyond these are rejected before training. Default: none.
        retries: Number of retries for each kind of failure. Default: `nas.Retries()`.
        max_failures: Number of failures in a row that end the search. Default: 10.
        lease_s: Seconds after which a job that was not told may be asked again, if there is nothing
            else to do; None for no limit. Whoever tells first counts. Default: 3600.
        directions: What is better in metrics of which reports show a Pareto front, such as
            {"latency_ms": "min", "top5": "max"}. They do not change the search. Default: those of
            the run, or less is better in metrics with names such as `params_m` or `latency_ms`.
        compare: Metric of the population's members that jobs get as `Job.rivals`. Default: none.
        setup: Space, evaluator and limits, pickled, for `Result.resume`. Default: none.
        evaluator: What the fitness depends on (`nas.evaluators.evaluator.identity_of`); a store
            with other values is refused. Default: unknown, which fits every store.
        code: Fingerprints of what the search runs (`nas.ask_tell.code_changes.code_of`). Default:
            those of space and limits.
        other_evaluator: Whether the store may have another evaluator, or other code of evaluator
            or limits. Default: False.
        other_space: Whether the store may have other code of the space. Default: False.
        **settings: Fields of `nas.Settings`: population, sample, seed, maximise, replacement,
            algorithm, fitness_policy. Without `population`, a search of fewer than 100 cycles or
            evaluations has half as many members, and a sample of a quarter of them.

    Attributes:
        store: The run's store, to read from.
        evolution: The population.
        evaluated: Number of evaluations with a fitness so far.
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
        cycles: int | None = None,
        evaluations: int | None = None,
        target: float | None = None,
        cache: bool | int = True,
        limits: Sequence[Limit] = (),
        retries: Retries | None = None,
        max_failures: int = 10,
        lease_s: float | None = LEASE_S,
        directions: Mapping[str, Direction] | None = None,
        compare: str | None = None,
        setup: bytes | None = None,
        evaluator: Mapping[str, Any] | None = None,
        code: Code | None = None,
        other_evaluator: bool = False,
        other_space: bool = False,
        **settings: Any,
    ) -> None:
        keywords.check_names("nas.Search", settings, argument_names())
        self.space, self.length = spaces.as_space(space), length(cycles, evaluations)
        self.settings = arguments.settings(settings, self.length, run_folder(folder, name))
        arguments.check(
            cache=cache,
            max_failures=max_failures,
            target=target,
            lease_s=lease_s,
            retries=retries,
            compare=compare,
            directions=directions,
        )
        self.cycles, self.target = self.length.cycles, target
        self.limit_check = LimitCheck(arguments.as_limits(limits))
        self.retries, self.failure_counter = retries or Retries(), FailureCounter(max_failures)
        self.proposal_counter = FailureCounter(max_failures, "proposals")
        self.leases = Leases(lease_s)
        identity = reopening.Identity(
            self.space.name,
            {**self.settings.to_dict(), "cache": int(cache)},
            [limit.identity for limit in self.limit_check.limits],
            code or code_changes.code_of(self.space, self.limit_check.limits),
            evaluator,
        )
        other = reopening.others(evaluate=other_evaluator, space=other_space)
        self.store = reopening.open_store(run_folder(folder, name), name, identity, setup, other)
        self.compare = compare
        self.weight_files = trained_values.WeightFiles(self.store, self.settings.fitness_policy)
        self._is_closed = self._has_warned = False
        self._lock = threading.RLock()
        self._queue: deque[Job] = deque()  # without a number of the evaluation
        self._pending: dict[int, PendingCandidate] = {}  # by candidate
        self._unscheduled: deque[int] = deque()  # candidates that are pending
        self._tournaments: dict[int, Tournament] = {}  # by the candidate to be proposed
        try:
            self._run = leases.identity(self.store.study())
            self.duplicates = Duplicates(self.store, int(cache))
            if directions is not None:
                self.store.set_directions(directions)
            self.evolution = pending.restore_evolution(self.store, self.space, self.settings)
            self._restore()
        except BaseException:
            self.close()
            raise

    def ask(self, until: Callable[[], bool] = lambda: False) -> Job | None:
        """Return the next job.

        The cache may answer many candidates before one is to be evaluated. Limits are measured
        here, and other threads may ask and tell meanwhile.

        Args:
            until: Called between candidates; if it returns True, `ask` returns None. Default: a
                function that returns False.

        Returns:
            The job, or None if there is none now: the search is over, or it waits for reports of
            running jobs. A job that was never told is returned again after `lease_s` seconds.

        Raises:
            nas.FailuresError: Too many candidates were rejected, or have failed, in a row.
        """
        with self._lock:
            self._schedule_all()
            while not (self._is_closed or self.is_over or until()):
                self.limit_check.check_rejections()
                if self._is_budget_taken():
                    return self._take_expired()
                if self._queue:
                    job = self._queue.popleft()
                    if self._keeps_limits(job):
                        if not self._is_budget_taken():
                            return self._start(job)
                        self._queue.appendleft(job)  # others asked meanwhile
                elif self._may_advance():
                    self._advance()
                else:
                    return self._take_expired()
        return None

    def _is_budget_taken(self) -> bool:
        """Return whether the evaluations that run are the last ones, if none of them fails."""
        budget = self.length.evaluations
        return budget is not None and self.evaluated + len(self.leases.running) >= budget

    def _take_expired(self) -> Job | None:
        """Start a job again that was never told, if there is one."""
        expired = self.leases.take_expired()
        return expired and self._start(replace(expired, attempt=expired.attempt + 1))

    def tell(self, job: Job, fitness: float | Mapping[str, Any]) -> None:
        """Take the fitness of a job.

        A job that was told before, or that belongs to an earlier driver, changes nothing.

        Args:
            job: What `ask` returned.
            fitness: A number, or a dict with `fitness`, other metrics, and `trained_values` (a text
                that says where the trained weights are). The worst fitness, -inf if the search
                maximises, is a result. NaN and the other infinity are failures.

        Raises:
            nas.errors.ReturnError: It is neither.
            nas.errors.MismatchError: The job is of another search.
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        arguments.check_report(job)
        self.report(job, outcomes.as_outcome(fitness, job))

    def report(self, job: Job, outcome: Outcome) -> None:
        """Take the outcome of a job, which may be a failure.

        Args:
            job: What `ask` returned.
            outcome: Its outcome, of kind `ok` or one of `nas.evaluators.evaluator.FAILURES`.

        Raises:
            nas.errors.MismatchError: The job is of another search.
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        arguments.check_report(job, outcome)
        leases.check_run(job, self._run)
        with self._lock:
            if self._is_closed:
                raise ValueError(
                    f"the search is closed, and the result of candidate {job.candidate} is not "
                    "stored: tell it before `close`, or open the search again"
                )
            if job.evaluation not in self.leases.running:
                with self.store.change("late", job.candidate, evaluation=job.evaluation):
                    return
            job = self.leases.running[job.evaluation]  # the caller may have changed its own
            outcome = self._without_unbeatable(outcome)
            self.weight_files.check_written(outcome)
            self._warn_left_out(outcome)
            if outcome.kind != "ok":
                self._end_failure(job, outcome)
            elif job.tournament is None:
                self._end_result(job, outcome)
            else:
                self._end_retraining(job, outcome)
            self._remove_weights()

    def fail(self, job: Job, error: BaseException | str) -> None:
        """Take the failure of a job, by an error or its text; the search may repeat the job.

        Args:
            job: What `ask` returned.
            error: What went wrong. Its type decides the kind of failure; a text is an exception.

        Raises:
            nas.errors.MismatchError: The job is of another search.
            nas.FailuresError: This failure is one too many.
        """
        if isinstance(error, str):
            self.report(job, Outcome("exception", error=error))
        elif isinstance(error, BaseException):
            self.report(job, outcomes.failed_outcome(error))
        else:
            raise TypeError(f"error {error!r}: expected an exception, or a text")

    @property
    def is_over(self) -> bool:
        """Return whether there are enough results or evaluations, or one meets the target."""
        if self.evolution.results >= self.cycles:
            return True
        budget = self.length.evaluations
        if budget is not None and self.evaluated >= budget:
            return True
        if self.target is None or self.best_fitness is None:
            return False
        return not self.settings.better(self.target, self.best_fitness)

    def close(self) -> None:
        """Close the store, so that another driver can open it."""
        with self._lock:
            self._is_closed = True
            self.store.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- proposals --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Propose the next candidate, or begin the tournament that comes before it."""
        number = self._next
        sample = [] if self.evolution.is_random else self.evolution.tournament(number)
        if self.settings.fitness_policy == "stored" or not sample:
            self._propose(number, sample)
            return
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

    def _propose(self, number: int, sample: Sequence[Member]) -> None:
        """Write the proposal that follows from a sample, and schedule its candidate."""
        method = "mutate" if sample else "random"
        try:
            proposal = self.evolution.child(number, sample)
            architecture, drawn = proposal.architecture, proposal.sample
            method = "encode"
            text = returned.text(method, self.space.encode(copies.own(architecture)))
            method = "canonical"
            canonical = returned.text(method, self.space.canonical(copies.own(architecture)))
            digest = digest_of(canonical)
        except Exception as error:  # the user's own code may raise anything
            self._skip(number, f"{method} of the space raised {outcomes.describe(error)}")
            return
        inherit = self.weight_files.of_candidate(proposal.parent)
        detail = json.dumps(drawn) if drawn else None
        with self.store.change("propose", number, detail=detail) as event:
            self.store.add_candidate(
                proposal,
                event,
                architecture=text,
                canonical=digest,
                state="open",
                metrics=None,
                inherit=inherit,
            )
        self._next = max(self._next, number + 1)
        self.proposal_counter.reset()
        self._pending[number] = PendingCandidate(architecture, digest, inherit, {}, drawn)
        self._schedule_all([number])

    def _skip(self, number: int, reason: str) -> None:
        """Give up a proposal that the space cannot make; the next one draws anew."""
        with self.store.change("skip", number, detail=reason):
            pass
        self._next = max(self._next, number + 1)
        warnings.warn(f"proposal {number} is skipped: {reason}", RuntimeWarning, stacklevel=2)
        self.proposal_counter.count(f"number {number}: {reason}")

    def _may_advance(self) -> bool:
        """Return whether there may be more proposals without more results."""
        proposed = self.evolution.results + len(self._pending) + len(self._tournaments)
        return proposed < self.cycles

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
        elif isinstance(answer, CachedResult):
            with self.store.change("answer", number, fitness=answer.fitness) as event:
                member = self._write_result(event, number, answer)
                self.store.set_candidate(number, answered_by=answer.evaluated)
            self._add_member(member)
            self.limit_check.accept()
        elif isinstance(answer, KnownFate):
            kind = "reject" if answer.state == "rejected" else "fail"
            with self.store.change(kind, number, detail=answer.reason):
                self.store.set_candidate(
                    number,
                    state=answer.state,
                    metrics=self.limit_check.measured_in(answer.metrics),
                    answered_by=answer.candidate,
                )
            del self._pending[number]
            self.limit_check.count_rejection(answer.reason)

    def _rivals(self, candidate: int) -> tuple[float, ...]:
        """Return the metric to compare by, of the members at the candidate's proposal."""
        return self.store.rivals(candidate, self.compare) if self.compare else ()

    def _keeps_limits(self, job: Job) -> bool:
        """Measure the architecture of a queued job; write it if it is rejected, or cannot be."""
        candidate = self._pending.get(job.candidate)
        if job.tournament is not None or candidate is None or not self.limit_check.limits:
            return True
        known = {**self.duplicates.metrics(candidate.digest), **candidate.metrics}
        measures = Measures(self.limit_check.measured_in(known))
        if not self.limit_check.is_measured(known):
            try:
                with self._unlocked():
                    measures = self.limit_check.measure(candidate.architecture)
            except BaseException:
                self._queue.appendleft(job)
                raise
            if self._is_closed:
                return False
        self._pending[job.candidate] = candidate._replace(metrics=measures.metrics)
        if measures.failure is not None:
            self._end_failure(self._start(job), measures.failure)
        elif measures.exceeded is not None:
            self._reject(job.candidate, measures.exceeded)
        return measures.failure is None and measures.exceeded is None

    def _reject(self, number: int, exceeded: str) -> None:
        """Give up a candidate that is beyond a limit."""
        candidate = self._pending[number]
        with self.store.change("reject", number, detail=exceeded):
            self.store.set_candidate(number, state="rejected", metrics=candidate.metrics)
        del self._pending[number]
        self.limit_check.count_rejection(exceeded)
        self._schedule_all(self.duplicates.finish(candidate.digest))

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let other threads ask and tell meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def _start(self, job: Job) -> Job:
        """Give a queued job its number, write it, and return it."""
        inherit = self.weight_files.if_exists(job.inherit)
        job = replace(job, evaluation=self._next_evaluation, inherit=inherit, run=self._run)
        with self.store.change("start", job.candidate, evaluation=job.evaluation):
            self.store.add_evaluation(job)
            if job.tournament is None and self.limit_check.limits:
                metrics = self._pending[job.candidate].metrics
                self.store.set_candidate(job.candidate, metrics=metrics)
        self._next_evaluation += 1
        self.leases.start(job)
        self.limit_check.accept()
        own = copies.own(job.architecture)
        return job if own is job.architecture else replace(job, architecture=own)

    # --- outcomes ---------------------------------------------------------------------------------

    def _without_unbeatable(self, outcome: Outcome) -> Outcome:
        """Return a failure for an infinite fitness that is better than all; the worst is legal."""
        fitness = outcome.fitness
        if fitness is None or not math.isinf(fitness) or not self.settings.better(fitness, 0.0):
            return outcome
        aim = "maximises" if self.settings.maximise else "minimises"
        text = f"the fitness is {fitness}, which nothing beats, as the search {aim}"
        return outcome._replace(kind="nan", fitness=None, error=text)

    def _warn_left_out(self, outcome: Outcome) -> None:
        """Warn of the first metrics that are left out; the log has all."""
        if outcome.kind == "ok" and outcome.error and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"evaluate returned {outcome.error}; this is said once, the log has all",
                RuntimeWarning,
                stacklevel=3,
            )

    def _end_result(self, job: Job, outcome: Outcome) -> None:
        """Add a candidate with its fitness to the population."""
        digest, others = self._pending[job.candidate].digest, self.leases.others(job)
        with self.store.change(
            "result", job.candidate, evaluation=job.evaluation, fitness=outcome.fitness
        ) as event:
            self.store.end_evaluation(job, outcome)
            self.store.lose_evaluations(others)
            member = self._write_result(event, job.candidate, outcome)
        self._add_member(member)
        self.evaluated += 1
        self.leases.end(job.evaluation, *others)
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
        others = self.leases.others(job)
        change = self.store.change("retrain", number, evaluation=job.evaluation, fitness=fitness)
        with change as event:
            self.store.end_evaluation(job, outcome)
            self.store.lose_evaluations(others)
            self.store.set_candidate(
                number,
                fitness=fitness,
                last_trained=event,
                metrics={**measured, **outcome.metrics},
                trained_values=outcome.trained_values,
            )
        self.evolution.refresh(number, fitness, event)
        self.evaluated += 1
        self.leases.end(job.evaluation, *others)
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
            self._propose(job.tournament, tournament.sample)

    def _end_failure(self, job: Job, outcome: Outcome) -> None:
        """Retry a failed job, or give it up after as many retries as its kind of failure has.

        If the job is out a second time, after its lease, that evaluation decides instead.
        """
        is_out = bool(self.leases.others(job))
        failures_before = self.store.attempts(job.candidate, job.tournament, outcome.kind)
        retry = failures_before < getattr(self.retries, outcome.kind)
        given_up = "fail" if job.tournament is None else "keep"
        event = "failure" if retry or is_out else given_up
        with self.store.change(
            event, job.candidate, evaluation=job.evaluation, detail=outcome.kind
        ):
            self.store.end_evaluation(job, outcome)
            if event == "fail":
                self.store.set_candidate(job.candidate, state="failed")
        self.leases.end(job.evaluation)
        if event == "keep":
            self._record_in_tournament(job, None)
        elif event == "fail":
            failed = self._pending.pop(job.candidate)
            self._unscheduled.extend(self.duplicates.finish(failed.digest))
        elif not is_out:
            self._queue.appendleft(replace(job, attempt=job.attempt + 1))
        if outcome.kind != "worker_death" or event != "failure":
            # A cluster that is gone takes all jobs with it: those that are repeated do not count.
            description = f"candidate {job.candidate}, by {outcome.kind}: {outcome.error}"
            self._count_failure(description)
        self._schedule_all()  # afterwards: a failure that ends the search gives up no duplicate

    def _count_failure(self, description: str) -> None:
        """Count a failure; if it ends the search, its cause is outside the networks."""
        try:
            self.failure_counter.count(description)
        except FailuresError:
            self.duplicates.forget_failures(self.store.forget_failures())
            raise

    def _remove_weights(self) -> None:
        self.weight_files.remove_unneeded(self._pending, self._tournaments, self.leases.running)

    # --- resuming ---------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Queue what the last driver left pending, ordered by number."""
        self._next, self._next_evaluation = self.store.next_numbers()
        self.evaluated = self.store.counts().evaluations
        self.best_fitness = next((row.fitness for row in self.store.ranked()), None)
        self._pending = pending.restore_candidates(self.store, self.space)
        self._schedule_all(self._pending)
        for number, tournament in pending.restore_tournaments(self.store, self.space).items():
            if tournament.untrained:
                self._queue_retrainings(number, tournament)
            else:
                self._propose(number, tournament.sample)
        self._queue = deque(
            replace(job, attempt=1 + self.store.attempts(job.candidate, job.tournament))
            for job in self._queue
        )
        self._remove_weights()


def argument_names() -> list[str]:
    """Return the names of the arguments of `Search`, with those of `nas.Settings`."""
    return [*keywords.names_of(Search), *keywords.names_of(Settings)]
