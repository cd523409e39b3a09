"""The search as a loop that is open: `ask` for what to train, `tell` how good it was.

    search = nas.Search(space=nas.NASNetSpace(), name="first", population=100, sample=25)
    while (job := search.ask()) is not None:
        search.tell(job, accuracy(job.architecture))

Any number of jobs may be under way, and reported in any order, from any thread. All is
written to the store before it is acted on: a search of the same name goes on where the last was.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.ask_tell import pending, reopening, trained_values
from nas.ask_tell.duplicates import CachedResult, Duplicates, digest
from nas.ask_tell.limits import FailureCounter, Limit, LimitCheck, Retries
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.evaluators import evaluator as evaluate
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Member, Proposal, Settings
from nas.spaces import space as spaces


class Search:
    """Evolution with a store, a cache, limits and retries; see the module's first lines.

    `cycles` is the number of candidates with a fitness at which the search is over, and `target` a
    fitness that ends it before. `cache` says whether equal networks are trained only once, or how
    many times before the mean answers. `compare` is a metric of the members that jobs are told
    (`Job.rivals`), to give up the hopeless. `evaluator` is what fitnesses go by, the same as in the
    file unless it may be an `other_evaluator` (`nas.ask_tell.reopening`). The rest are the fields of
    `nas.evolution.evolution.Settings`.
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
        self.space, self.settings = spaces.as_space(space), Settings(**settings)
        reopening.check_arguments(self.settings, cycles, cache, max_failures)
        self.cycles, self.target, self.limit_check = cycles, target, LimitCheck(limits)
        self.retries, self.failure_counter = retries or Retries(), FailureCounter(max_failures)
        same = {**self.settings.to_dict(), "cache": int(cache)}
        kept = [limit.identity for limit in self.limit_check.limits]
        self.store = reopening.open_store(
            Path(folder) / name, name, self.space, same, kept, setup, evaluator, other_evaluator
        )
        self.weight_files = trained_values.WeightFiles(
            self.store, self.settings.fitness_policy, compare
        )
        self._lock = threading.RLock()
        self.duplicates = Duplicates(self.store, int(cache))
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by evaluation
        self._pending: dict[int, PendingCandidate] = {}  # by candidate, as are these:
        self._unscheduled: deque[int] = deque()
        self._tournaments: dict[int, Tournament] = {}
        try:
            self.evolution = pending.restore_evolution(self.store, self.space, self.settings)
            self._restore()
        except BaseException:
            self.close()
            raise

    def ask(self, until: Callable[[], bool] = lambda: False) -> Job | None:
        """The next job; None if there is none now: the search is over, or waits for reports.

        The cache may answer many candidates before one is to be trained; between them `until` is
        called, and by True makes this return None.
        """
        with self._lock:
            self._schedule_all()
            while not self.is_over and not until():
                if self._queue:
                    return self._start(self._queue.popleft())
                if (
                    self.evolution.results + len(self._pending) + len(self._tournaments)
                    >= self.cycles
                ):
                    return None
                self._advance()
        return None

    def tell(self, job: Job, fitness: float | Mapping[str, Any]) -> None:
        """The fitness of a job, or a dict with `fitness` and other metrics; NaN is a failure.

        To tell a job twice, or one of a driver that is gone, changes nothing.
        """
        self.report(job, outcomes.as_outcome(fitness, job))

    def report(self, job: Job, outcome: Outcome) -> None:
        """What came of a job, also if it failed; FailuresError if that is one too many.

        `nas.errors.LostWeightsError` if what it trained is not there; nothing is written then.
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
                self._end_retrained(job, outcome)
            self.weight_files.remove_unneeded(self._pending, self._tournaments, self._running)

    @property
    def is_over(self) -> bool:
        """Whether there are enough results, or one is as good as the target."""
        if self.evolution.results >= self.cycles:
            return True
        if self.target is None or self.best_fitness is None:
            return False
        return not self.settings.better(self.target, self.best_fitness)

    def close(self) -> None:
        """Let go of the store, for another driver."""
        with self._lock:
            self.store.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- proposals --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """The next proposal, or the tournament that has to come before it."""
        number = self._next
        if self.settings.fitness_policy == "stored" or self.evolution.is_random:
            return self._propose(self.evolution.propose(number))
        sample = self.evolution.tournament(number)
        inherit = {m.candidate: self.weight_files.of_candidate(m.candidate) for m in sample}
        tournament = Tournament(sample, set(inherit), inherit)
        with self.store.change("tournament", number, detail=tournament.event_detail):
            pass
        self._next = number + 1
        self._queue_retrainings(number, tournament)

    def _queue_retrainings(self, number: int, tournament: Tournament) -> None:
        """Have the members trained again that have not been."""
        self._tournaments[number] = tournament
        missing = {m.candidate: m for m in tournament.sample if m.candidate in tournament.untrained}
        for candidate, member in missing.items():
            # Files of version 1 do not say where it starts.
            start = tournament.inherit.setdefault(
                candidate, self.weight_files.of_candidate(candidate)
            )
            seed = evaluate.job_seed(self.settings.seed, candidate, number)
            self._queue.append(Job(0, candidate, member.architecture, seed, 1, number, start))

    def _propose(self, proposal: Proposal) -> None:
        number, architecture, parent, _, sample = proposal
        metrics, broken = self.limit_check.measure(architecture)
        network = digest(self.space.canonical(architecture))
        detail = broken or (json.dumps(sample) if sample else None)
        inherit = self.weight_files.of_candidate(parent)
        with self.store.change("reject" if broken else "propose", number, detail=detail) as event:
            self.store.add_candidate(
                proposal,
                event,
                architecture=self.space.encode(architecture),
                canonical=network,
                state="rejected" if broken else "open",
                metrics=metrics,
                inherit=inherit,
            )
        self._next = max(self._next, number + 1)
        if broken:
            self.limit_check.count_rejection(broken)
        else:
            self._pending[number] = PendingCandidate(
                architecture, network, inherit, metrics, sample
            )
            self._schedule_all([number])

    def _schedule_all(self, more: Iterable[int] = ()) -> None:
        """Place these, and before them what an answer that could not be written has left."""
        self._unscheduled.extend(more)
        while self._unscheduled:
            self._schedule(self._unscheduled[0])
            self._unscheduled.popleft()

    def _schedule(self, number: int) -> None:
        """Answer a candidate from the cache, let it wait for its twin, or have it evaluated."""
        found = self._pending[number]
        seed = evaluate.job_seed(self.settings.seed, number)
        start = {"inherit": found.inherit, "rivals": self.weight_files.rivals(number)}
        answer = self.duplicates.look_up(found.digest, number)
        if answer == "evaluate":
            self._queue.append(Job(0, number, found.architecture, seed, **start))
        elif answer != "wait":
            with self.store.change("answer", number, fitness=answer.fitness) as event:
                member = self._write_result(event, number, answer)
                self.store.set_candidate(number, answered_by=answer.evaluated)
            self._add_member(member)

    def _start(self, job: Job) -> Job:
        inherit = self.weight_files.if_exists(job.inherit)
        job = replace(job, evaluation=self._next_evaluation, inherit=inherit)
        with self.store.change("start", job.candidate, evaluation=job.evaluation):
            self.store.add_evaluation(job)
        self._next_evaluation += 1
        self._running[job.evaluation] = job
        return job

    # --- outcomes ---------------------------------------------------------------------------------

    def _end_result(self, job: Job, outcome: Outcome) -> None:
        network = self._pending[job.candidate].digest
        named = {"evaluation": job.evaluation, "fitness": outcome.fitness}
        with self.store.change("result", job.candidate, **named) as event:
            self.store.end_evaluation(job, outcome)
            member = self._write_result(event, job.candidate, outcome)
        self._add_member(member)
        del self._running[job.evaluation]
        self.failure_counter.reset()
        self._schedule_all(self.duplicates.finish(network))

    def _write_result(self, event: int, number: int, result: Outcome | CachedResult) -> Member:
        """Within a change, that a candidate joins the population; returns what is to be joined."""
        found, fitness = self._pending[number], result.fitness or 0.0
        member = Member(number, found.architecture, fitness, event)
        removed = self.evolution.removed_by(member, found.sample)
        self.store.set_candidate(
            number,
            state="done",
            fitness=fitness,
            metrics={**found.metrics, **result.metrics},
            last_trained=event,
            trained_values=result.trained_values,
        )
        if removed:
            self.store.set_candidate(removed.candidate, removed=event)
        return member

    def _add_member(self, member: Member) -> None:
        """The same in memory, once it is written."""
        self.evolution.add(member, self._pending.pop(member.candidate).sample)
        if self.best_fitness is None or self.settings.better(member.fitness, self.best_fitness):
            self.best_fitness = member.fitness

    def _end_retrained(self, job: Job, outcome: Outcome) -> None:
        number, fitness = job.candidate, outcome.fitness or 0.0
        metrics = {
            **self.limit_check.measured_in(self.store.candidate(number).metrics),
            **outcome.metrics,
        }
        kept = {"metrics": metrics, "trained_values": outcome.trained_values}
        change = self.store.change("retrain", number, evaluation=job.evaluation, fitness=fitness)
        with change as event:
            self.store.end_evaluation(job, outcome)
            self.store.set_candidate(number, fitness=fitness, last_trained=event, **kept)
        self.evolution.refresh(number, fitness, event)
        del self._running[job.evaluation]
        self.failure_counter.reset()
        self.best_fitness = next((row.fitness for row in self.store.ranked()), None)
        self._end_retraining(job, fitness)

    def _end_retraining(self, job: Job, fitness: float | None) -> None:
        """A retraining has ended; without a fitness the member keeps the one it has."""
        assert job.tournament is not None
        tournament = self._tournaments[job.tournament]
        tournament.record(job.candidate, fitness)
        if not tournament.untrained:
            del self._tournaments[job.tournament]
            self._propose(self.evolution.child(job.tournament, tournament.sample))

    def _end_failure(self, job: Job, outcome: Outcome) -> None:
        """Try again, or give the candidate up, as the retries of this kind of failure are."""
        before = self.store.attempts(job.candidate, job.tournament, outcome.kind)
        again = before < getattr(self.retries, outcome.kind)
        event = "failure" if again or job.tournament is not None else "fail"
        with self.store.change(
            event, job.candidate, evaluation=job.evaluation, detail=outcome.kind
        ):
            self.store.end_evaluation(job, outcome)
            if event == "fail":
                self.store.set_candidate(job.candidate, state="failed")
        del self._running[job.evaluation]
        if again:
            self._queue.appendleft(replace(job, attempt=job.attempt + 1))
        elif job.tournament is not None:
            self._end_retraining(job, None)
        else:
            self._schedule_all(self.duplicates.finish(self._pending.pop(job.candidate).digest))
        self.failure_counter.count(f"candidate {job.candidate}, by {outcome.kind}: {outcome.error}")

    # --- going on ---------------------------------------------------------------------------------

    def _restore(self) -> None:
        """What the last driver left under way is to be done first, in the order of its numbers."""
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
