"""End jobs: a fitness joins the population, a retraining refreshes it, a failure is retried."""

import math
import warnings
from dataclasses import replace

from nas.ask_tell.candidates.memory import Memory
from nas.ask_tell.candidates.proposals import Proposals
from nas.ask_tell.candidates.schedule import Schedule
from nas.ask_tell.limits import FailureCounter, Retries
from nas.errors import FailuresError
from nas.evaluators.evaluator import Job, Outcome


class Results:
    """Write the outcomes of running jobs, and schedule what follows from them."""

    def __init__(
        self,
        memory: Memory,
        schedule: Schedule,
        proposals: Proposals,
        retries: Retries,
        max_failures: int,
    ) -> None:
        self._memory, self._schedule, self._proposals = memory, schedule, proposals
        self._retries, self._counter = retries, FailureCounter(max_failures)
        self._has_warned = False

    def end(self, job: Job, outcome: Outcome) -> None:
        """Write the outcome of a running job.

        Raises:
            FailuresError: This failure is one too many.
            LostWeightsError: The trained weights are missing; nothing is written then.
        """
        outcome = self._without_unbeatable(outcome)
        self._memory.weight_files.check_written(outcome)
        self._warn_left_out(outcome)
        if outcome.kind != "ok":
            self.end_failure(job, outcome)
        elif job.tournament is None:
            self._end_result(job, outcome)
        else:
            self._end_retraining(job, job.tournament, outcome)
        self._memory.remove_weights()

    def _without_unbeatable(self, outcome: Outcome) -> Outcome:
        """Return a failure for an infinite fitness that is better than all; the worst is legal."""
        fitness, settings = outcome.fitness, self._memory.settings
        if fitness is None or not math.isinf(fitness) or not settings.better(fitness, 0.0):
            return outcome
        aim = "maximises" if settings.maximise else "minimises"
        text = f"the fitness is {fitness}, which nothing beats, as the search {aim}"
        return outcome._replace(kind="nan", fitness=None, error=text)

    def _warn_left_out(self, outcome: Outcome) -> None:
        """Warn of the first metrics that are left out; the log has all."""
        if outcome.kind == "ok" and outcome.error and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"evaluate returned {outcome.error}; this warning is shown once, the log has all",
                RuntimeWarning,
                stacklevel=4,
            )

    def _end_result(self, job: Job, outcome: Outcome) -> None:
        """Add a candidate with its fitness to the population."""
        memory = self._memory
        digest, others = memory.pending[job.candidate].digest, memory.leases.others(job)
        with memory.store.change(
            "result", job.candidate, evaluation=job.evaluation, fitness=outcome.fitness
        ) as event:
            memory.store.end_evaluation(job, outcome)
            memory.store.lose_evaluations(others)
            member = memory.write_result(event, job.candidate, outcome)
        memory.add_member(member)
        self._count_success(job, others)
        self._schedule.schedule(memory.duplicates.finish(digest))

    def _end_retraining(self, job: Job, tournament: int, outcome: Outcome) -> None:
        """Give a member that was trained again its new fitness."""
        memory, number, fitness = self._memory, job.candidate, outcome.fitness or 0.0
        measured = memory.limit_check.measured_in(memory.store.candidate(number).metrics)
        others = memory.leases.others(job)
        change = memory.store.change("retrain", number, evaluation=job.evaluation, fitness=fitness)
        with change as event:
            memory.store.end_evaluation(job, outcome)
            memory.store.lose_evaluations(others)
            memory.store.set_candidate(
                number,
                fitness=fitness,
                last_trained=event,
                metrics={**measured, **outcome.metrics},
                trained_values=outcome.trained_values,
            )
        memory.evolution.refresh(number, fitness, event)
        memory.find_best()
        self._count_success(job, others)
        self._proposals.record_retraining(tournament, number, fitness)

    def _count_success(self, job: Job, others: list[int]) -> None:
        """Count an evaluation with a fitness; nobody waits for its repetitions any more."""
        self._memory.evaluated += 1
        self._memory.end_job(job, others)
        self._counter.reset()

    def end_failure(self, job: Job, outcome: Outcome) -> None:
        """Retry a failed job, or give it up after as many retries as its kind of failure has.

        If the same job is out again, after its lease, that evaluation decides instead.
        """
        memory = self._memory
        is_out, others = memory.leases.is_out_again(job), memory.leases.others(job)
        failures_before = memory.store.attempts(job.candidate, job.tournament, outcome.kind)
        retry = failures_before < getattr(self._retries, outcome.kind)
        given_up = "fail" if job.tournament is None else "keep"
        event = "failure" if retry or is_out else given_up
        with memory.store.change(
            event, job.candidate, evaluation=job.evaluation, detail=outcome.kind
        ):
            memory.store.end_evaluation(job, outcome)
            if event == "fail":
                memory.store.set_candidate(job.candidate, state="failed")
            if event == given_up:
                memory.store.lose_evaluations(others)
        memory.end_job(job, others if event == given_up else ())
        if event == "keep":
            assert job.tournament is not None
            self._proposals.record_retraining(job.tournament, job.candidate, None)
        elif event == "fail":
            failed = memory.pending.pop(job.candidate)
            self._schedule.put_off(memory.duplicates.finish(failed.digest))
        elif not is_out:
            memory.queue.appendleft(replace(job, attempt=job.attempt + 1))
        if outcome.kind != "worker_death" or event != "failure":
            # A cluster that is gone takes all jobs with it: those that are repeated do not count.
            self._count_failure(f"candidate {job.candidate}, by {outcome.kind}: {outcome.error}")
        self._schedule.schedule()  # afterwards: a failure that ends the search leaves duplicates

    def _count_failure(self, description: str) -> None:
        """Count a failure; if it ends the search, its cause is outside the networks."""
        try:
            self._counter.count(description)
        except FailuresError:
            self._memory.duplicates.forget_failures(self._memory.store.forget_failures())
            raise
