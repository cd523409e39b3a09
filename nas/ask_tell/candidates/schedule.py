"""Schedule candidates: the cache answers them, or they wait for a duplicate, or get a job."""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from nas.ask_tell.candidates.memory import Memory
from nas.ask_tell.duplicates import CachedResult, KnownFate
from nas.ask_tell.pending import Tournament
from nas.evaluators.evaluator import Job, job_seed
from nas.spaces import copies


class Schedule:
    """Queue the jobs of candidates and of tournaments, and start them."""

    def __init__(self, memory: Memory, run: str) -> None:
        self._memory, self._run = memory, run
        self._unscheduled: deque[int] = deque()  # candidates that are pending

    def put_off(self, candidates: Iterable[int]) -> None:
        """Schedule these candidates with the next ones."""
        self._unscheduled.extend(candidates)

    def schedule(self, candidates: Iterable[int] = ()) -> None:
        """Schedule these candidates, after those that were put off or left by an error."""
        self._unscheduled.extend(candidates)
        while self._unscheduled:
            self._schedule(self._unscheduled[0])
            self._unscheduled.popleft()

    def _schedule(self, number: int) -> None:
        """Answer a candidate from the cache, let it wait for a duplicate, or queue its job."""
        memory, candidate = self._memory, self._memory.pending[number]
        answer = memory.duplicates.look_up(candidate.digest, number)
        if answer == "evaluate":
            job = Job(
                evaluation=0,
                candidate=number,
                architecture=candidate.architecture,
                seed=job_seed(memory.settings.seed, number),
                inherit=candidate.inherit,
                rivals=memory.rivals(number),
            )
            memory.queue.append(job)
        elif isinstance(answer, CachedResult):
            with memory.store.change("answer", number, fitness=answer.fitness) as event:
                member = memory.write_result(event, number, answer)
                memory.store.set_candidate(number, answered_by=answer.evaluated)
            memory.add_member(member)
            memory.limit_check.accept()
        elif isinstance(answer, KnownFate):
            self._give_up(number, answer)

    def _give_up(self, number: int, fate: KnownFate) -> None:
        """Give up a candidate that is equal to one that was."""
        memory = self._memory
        kind = "reject" if fate.state == "rejected" else "fail"
        with memory.store.change(kind, number, detail=fate.reason):
            memory.store.set_candidate(
                number,
                state=fate.state,
                metrics=memory.limit_check.measured_in(fate.metrics),
                answered_by=fate.candidate,
            )
        del memory.pending[number]
        memory.limit_check.count_rejection(fate.reason)

    def queue_retrainings(self, number: int, tournament: Tournament) -> None:
        """Queue jobs for the members that have not been trained again."""
        memory = self._memory
        memory.tournaments[number] = tournament
        members = {m.candidate: m for m in tournament.sample if m.candidate in tournament.untrained}
        for candidate, member in members.items():
            if candidate not in tournament.inherit:  # as in stores of version 1
                tournament.inherit[candidate] = memory.weight_files.of_candidate(candidate)
            seed = job_seed(memory.settings.seed, candidate, number)
            start = tournament.inherit[candidate]
            memory.queue.append(Job(0, candidate, member.architecture, seed, 1, number, start))

    def start(self, job: Job) -> Job:
        """Give a queued job its number, write it, and return it."""
        memory = self._memory
        inherit = memory.weight_files.if_exists(job.inherit)
        job = replace(job, evaluation=memory.next_evaluation, inherit=inherit, run=self._run)
        with memory.store.change("start", job.candidate, evaluation=job.evaluation):
            memory.store.add_evaluation(job)
            if job.tournament is None and memory.limit_check.limits:
                metrics = memory.pending[job.candidate].metrics
                memory.store.set_candidate(job.candidate, metrics=metrics)
        memory.next_evaluation += 1
        memory.leases.start(job)
        memory.limit_check.accept()
        own = copies.own(job.architecture)
        return job if own is job.architecture else replace(job, architecture=own)

    def start_expired(self) -> Job | None:
        """Start a job again that was not told within its lease; return None if there is none."""
        expired = self._memory.leases.take_expired()
        return expired and self.start(replace(expired, attempt=expired.attempt + 1))

    def count_attempts(self) -> None:
        """Number the attempts of the queued jobs, which earlier drivers may have begun."""
        memory = self._memory
        memory.queue = deque(
            replace(job, attempt=1 + memory.store.attempts(job.candidate, job.tournament))
            for job in memory.queue
        )
