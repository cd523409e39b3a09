"""Answer candidates from the cache: architectures that are the same network share evaluations.

Two candidates are duplicates if the digests of their canonical forms are equal. Each digest gets
`limit` evaluations: one, or several if evaluations have noise. Later duplicates get the mean of the
fitness, and of each metric over the evaluations that have it. A duplicate of a running candidate
waits for its result instead of being trained too.

    candidate --> look_up --> CachedResult     there are `limit` results: they answer
                          --> "wait"           enough evaluations are running
                          --> "evaluate"       otherwise
"""

import hashlib
from collections import defaultdict
from typing import Literal, NamedTuple

from nas.evaluators import outcomes
from nas.storage.reader import Reader


class CachedResult(NamedTuple):
    """Hold the result that a duplicate gets."""

    evaluated: int  # the candidate that was evaluated; the first, if there are several
    fitness: float
    metrics: dict[str, float]
    trained_values: str | None


class Duplicates:
    """Track the running evaluations and the waiting candidates of each digest.

    Only these are in memory; results are looked up in the store.
    """

    def __init__(self, reader: Reader, limit: int) -> None:
        self.reader, self.limit = reader, limit
        self.running: dict[str, int] = defaultdict(int)
        self.waiting: dict[str, list[int]] = defaultdict(list)

    def look_up(self, digest: str, candidate: int) -> CachedResult | Literal["evaluate", "wait"]:
        """Return the cached result for a candidate, or what happens to it instead."""
        if not self.limit:
            return "evaluate"
        where = "canonical = ? AND answered_by IS NULL AND state = 'done'"
        rows = list(self.reader.candidates(where, digest, order=f"id LIMIT {self.limit}"))
        if len(rows) >= self.limit:
            means = outcomes.mean_metrics([row.metrics for row in rows])
            fitness = sum(row.fitness or 0.0 for row in rows) / len(rows)
            return CachedResult(rows[0].id, fitness, means, rows[0].trained_values)
        if self.running[digest] + len(rows) >= self.limit:
            self.waiting[digest].append(candidate)
            return "wait"
        self.running[digest] += 1
        return "evaluate"

    def finish(self, digest: str) -> list[int]:
        """End an evaluation, successful or not; return the waiting candidates to look up again."""
        if not self.limit:
            return []
        self.running[digest] -= 1
        if not self.running[digest]:
            del self.running[digest]
        return self.waiting.pop(digest, [])


def digest_of(canonical: str) -> str:
    """Return the digest of a canonical form: 24 hexadecimal digits."""
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()
