"""The cache of evaluations: which candidates are the same network, and what is known of it.

Of each network `limit` evaluations are made (one, unless evaluations have noise); candidates that
come later are answered with their mean, and that of each metric over those that have it. Twins of a
candidate under way wait for its result rather than being trained too.
"""

import hashlib
from collections import defaultdict
from typing import Literal, NamedTuple

from nas.evaluators import outcomes
from nas.storage.reader import Reader


class CachedResult(NamedTuple):
    """What is known of a network."""

    evaluated: int  # the candidate that was evaluated; the first, if there are several
    fitness: float
    metrics: dict[str, float]
    trained_values: str | None


class Duplicates:
    """What is under way, and who waits for it, of each network by the digest of its canonical form.

    Only that is kept in memory: what is known is looked up in the store.
    """

    def __init__(self, reader: Reader, limit: int) -> None:
        self.reader, self.limit = reader, limit
        self.running: dict[str, int] = defaultdict(int)
        self.waiting: dict[str, list[int]] = defaultdict(list)

    def look_up(self, network: str, candidate: int) -> CachedResult | Literal["evaluate", "wait"]:
        """The answer to a candidate, or what becomes of it."""
        if not self.limit:
            return "evaluate"
        where = "canonical = ? AND answered_by IS NULL AND state = 'done'"
        rows = list(self.reader.candidates(where, network, order=f"id LIMIT {self.limit}"))
        n = len(rows)
        if n >= self.limit:
            means = outcomes.mean_metrics([row.metrics for row in rows])
            fitness = sum(row.fitness or 0.0 for row in rows) / n
            return CachedResult(rows[0].id, fitness, means, rows[0].trained_values)
        if self.running[network] + n >= self.limit:
            self.waiting[network].append(candidate)
            return "wait"
        self.running[network] += 1
        return "evaluate"

    def finish(self, network: str) -> list[int]:
        """One under way has ended, well or badly; returns those that waited, to be placed anew."""
        if not self.limit:
            return []
        self.running[network] -= 1
        if not self.running[network]:
            del self.running[network]
        return self.waiting.pop(network, [])


def digest(canonical: str) -> str:
    """A short name of a network."""
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()
