"""Track the jobs that are out, and when each may be handed out again.

A job whose asker has died is never told. After its lease it is handed out once more, but only when
there is nothing else to do. So a lease that is too short costs a training, never a result: whoever
tells first gives the candidate its fitness, and the other report is late.
"""

import time

from nas.errors import MismatchError
from nas.evaluators.evaluator import Job
from nas.storage.reader import Study

LEASE_S = 3600.0


class Leases:
    """Hold the running jobs by the number of their evaluation, the oldest first."""

    def __init__(self, lease_s: float | None) -> None:
        self._lease_s = lease_s  # None: leases do not end
        self.running: dict[int, Job] = {}
        self._ends: dict[int, float] = {}  # on the clock time.monotonic

    def start(self, job: Job) -> None:
        """Begin the lease of a job."""
        self.running[job.evaluation] = job
        if self._lease_s is not None:
            self._ends[job.evaluation] = time.monotonic() + self._lease_s

    def take_expired(self) -> Job | None:
        """Return a job whose lease has ended, each once; None if there is none."""
        for evaluation, end in self._ends.items():
            if end > time.monotonic():
                return None
            del self._ends[evaluation]
            return self.running[evaluation]
        return None

    def others(self, job: Job) -> list[int]:
        """Return the other running evaluations of what the job evaluates."""
        if self._lease_s is None:
            return []
        return [
            evaluation
            for evaluation, other in self.running.items()
            if evaluation != job.evaluation and is_same_work(job, other)
        ]

    def is_out_again(self, job: Job) -> bool:
        """Return whether another evaluation of the same work is within its lease."""
        return any(evaluation in self._ends for evaluation in self.others(job))

    def end(self, *evaluations: int) -> None:
        """End the leases of these evaluations."""
        for evaluation in evaluations:
            del self.running[evaluation]
            self._ends.pop(evaluation, None)


def is_same_work(a: Job, b: Job) -> bool:
    """Return whether two jobs train the same candidate, for the same tournament if any."""
    return (a.candidate, a.tournament) == (b.candidate, b.tournament)


def identity(study: Study) -> str:
    """Return the text that identifies a run in its jobs: its name, and when it was created."""
    return f"{study.name!r}, created {study.created:.6f}"


def check_run(job: Job, run: str) -> None:
    """Raise MismatchError for a job that another search has handed out.

    A job without a run, such as one that was built by hand, fits any search.
    """
    if job.run and job.run != run:
        raise MismatchError(
            f"the job of candidate {job.candidate} is of the search {job.run}, but this is the "
            f"search {run}: tell it to the search that handed it out"
        )
