"""Answer candidates from the cache: architectures that are the same network share evaluations.

Two candidates are duplicates if the digests of their canonical forms are equal. Each digest gets
`limit` evaluations: one, or several if evaluations have noise. Later duplicates get the mean of the
fitness, and of each metric over the evaluations that have it. A duplicate of a running candidate
waits for its result instead of being trained too.

A network that was given up counts as evaluated. So its duplicates fail without being trained. If
all evaluations of a network have failed, or it is beyond a limit, its duplicates share that fate.
After the event `forget`, earlier failures count no more: they had a cause outside the network.

    candidate --> look_up --> CachedResult     there are `limit` results: they answer
                          --> KnownFate        the network has failed, or is beyond a limit
                          --> "wait"           enough evaluations are running
                          --> "evaluate"       otherwise
"""

import hashlib
from collections import defaultdict
from typing import Literal, NamedTuple

from nas.evaluators import outcomes
from nas.storage.reader import CandidateRow, Reader


class CachedResult(NamedTuple):
    """Hold the result that a duplicate gets."""

    evaluated: int  # the candidate that was evaluated; the first, if there are several
    fitness: float
    metrics: dict[str, float]
    trained_values: str | None


class KnownFate(NamedTuple):
    """Say why the duplicate of a candidate is not evaluated."""

    state: Literal["failed", "rejected"]
    candidate: int  # the one that was given up or rejected
    metrics: dict[str, float]

    @property
    def reason(self) -> str:
        """Return a text for the log."""
        fate = "was given up" if self.state == "failed" else "is beyond a limit"
        return f"equal to candidate {self.candidate}, which {fate}"


class Duplicates:
    """Track the running evaluations and the waiting candidates of each digest.

    Only these are in memory; results are looked up in the store.
    """

    def __init__(self, reader: Reader, limit: int) -> None:
        self.reader, self.limit = reader, limit
        self.running: dict[str, int] = defaultdict(int)
        self.waiting: dict[str, list[int]] = defaultdict(list)
        self._forgotten = reader.last_event("forget")  # earlier failures do not count

    def forget_failures(self, event: int) -> None:
        """Let networks that failed before this event be evaluated again."""
        self._forgotten = event

    def look_up(
        self, digest: str, candidate: int
    ) -> CachedResult | KnownFate | Literal["evaluate", "wait"]:
        """Return the cached result for a candidate, or what happens to it instead."""
        if not self.limit:
            return "evaluate"
        where = (
            "canonical = ? AND answered_by IS NULL AND (state IN ('done', 'rejected') "
            "OR (state = 'failed' AND proposed > ?))"
        )
        order = f"id LIMIT {self.limit}"
        rows = list(self.reader.candidates(where, digest, self._forgotten, order=order))
        if any(row.state == "rejected" for row in rows):
            return KnownFate("rejected", rows[0].id, rows[0].metrics)
        if len(rows) >= self.limit:
            return _answer(rows)
        if self.running[digest] + len(rows) >= self.limit:
            self.waiting[digest].append(candidate)
            return "wait"
        self.running[digest] += 1
        return "evaluate"

    def metrics(self, digest: str) -> dict[str, float]:
        """Return the metrics of a duplicate, which may have failed; empty if there is none."""
        where = "canonical = ? AND answered_by IS NULL AND metrics IS NOT NULL"
        for row in self.reader.candidates(where, digest, order="id LIMIT 1") if self.limit else ():
            return row.metrics
        return {}

    def finish(self, digest: str) -> list[int]:
        """End an evaluation, successful or not; return the waiting candidates to look up again."""
        if not self.limit:
            return []
        self.running[digest] -= 1
        if not self.running[digest]:
            del self.running[digest]
        return self.waiting.pop(digest, [])


def _answer(rows: list[CandidateRow]) -> CachedResult | KnownFate:
    """Return the mean of the results, or the failure if there is no result."""
    done = [row for row in rows if row.state == "done"]
    if not done:
        return KnownFate("failed", rows[0].id, rows[0].metrics)
    means = outcomes.mean_metrics([row.metrics for row in done])
    fitness = sum(row.fitness or 0.0 for row in done) / len(done)
    return CachedResult(done[0].id, fitness, means, done[0].trained_values)


def digest_of(canonical: str) -> str:
    """Return the digest of a canonical form: 24 hexadecimal digits."""
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()
