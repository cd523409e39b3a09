"""The report of a run: what was searched, how it went, and what was found.

All of it is read from the store, at one moment, so that a run can be reported on while it goes on;
only what an export has trained again is in a file beside it.
"""

import time
from collections import deque
from typing import Any, NamedTuple

from gpipe_jax.utils import progress
from nas.reports.tables import SearchTable, as_text, finite
from nas.storage import finals_file, queries
from nas.storage.reader import CandidateRow, Counts, Reader, Study

BEST, FRONT = 10, 10  # rows that are shown


class Failure(NamedTuple):
    """A kind of failure, how often, and the last one's error."""

    kind: str
    count: int
    error: str


class Report(NamedTuple):
    """What is said of a run, as text by `str`, and by `to_dict` as plain values."""

    study: Study
    path: str
    counts: Counts
    is_driven: bool
    work_s: float  # in which drivers were at work
    failures: list[Failure]
    best: list[CandidateRow]  # of different networks
    fronts: dict[str, list[CandidateRow]]  # by cost
    again: list[finals_file.Retrained]  # trained again, by `nas export`

    def facts(self) -> dict[str, Any]:
        """The study and its numbers, by name."""
        counts, settings = self.counts, dict(self.study.settings)
        aim = "maximise" if settings.pop("maximise") else "minimise"
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.study.created))
        under_way = f", {counts.running} under way" * (counts.running > 0)
        under_way += " when the last driver ended" * (bool(under_way) and not self.is_driven)
        return {
            "run": self.path,
            "state": "a driver is at work" if self.is_driven else "no driver is at work",
            "space": self.study.space,
            "settings": ", ".join([aim, *(f"{k} {v}" for k, v in settings.items())]),
            "begun": f"{began}; {self.work_s:.1f} s at work",
            "candidates": f"{counts.proposed} proposed, {counts.results} with a fitness, "
            f"{counts.rejected} beyond a limit, {counts.failed} given up",
            "evaluations": f"{counts.evaluations} done, {counts.failures} failed{under_way}",
            "cache hits": f"{counts.cache_hits} ({_share(counts.cache_hits, counts.results)} of "
            "the candidates with a fitness)",
        }

    def tables(self) -> list[SearchTable]:
        """Failures, the best candidates, those trained again, and a front for each cost."""
        found = []
        if self.failures:
            found.append(SearchTable("failures", ("kind", "count", "last error"), self.failures))
        if self.best:
            found.append(_candidates("best candidates", self.best))
        if self.again:
            rows = [(f"#{one.candidate}", one.epochs, one.fitness) for one in self.again]
            found.append(SearchTable("trained again", ("candidate", "epochs", "fitness"), rows))
        for cost, rows in self.fronts.items():
            title = f"Pareto front, fitness against {cost}: {len(rows)} candidates"
            shown = title + f", the {FRONT} best" * (len(rows) > FRONT)
            found.append(_candidates(shown, rows[:FRONT]))
        return found

    def __str__(self) -> str:
        facts = f"search {self.study.name}\n{progress.table(self.facts())}"
        return "\n\n".join([facts, *map(as_text, self.tables())])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = self.best[0] if self.best else None
        return {
            "run": self.path,
            "name": self.study.name,
            "space": self.study.space,
            "settings": self.study.settings,
            "is_running": self.is_driven,
            "wall_s": self.work_s,
            **self.counts._asdict(),
            "failures_by_kind": {failure.kind: failure.count for failure in self.failures},
            "best_fitness": best.fitness if best else None,
            "best": [_entry(row) for row in self.best],
            "trained_again": [one._asdict() for one in self.again],
            "pareto": {cost: [_entry(row) for row in rows] for cost, rows in self.fronts.items()},
        }


def report(reader: Reader) -> Report:
    """Of a run, as far as it has come; give a `reading.Snapshot` if its driver is at work."""
    return Report(
        study=reader.study(),
        path=str(reader.path.parent),
        counts=reader.counts(),
        is_driven=queries.is_driven(reader),
        work_s=queries.work_s(reader),
        failures=_failures(reader),
        best=queries.top(reader, BEST),
        fronts={cost: list(queries.pareto_front(reader, cost)) for cost in queries.cost_metrics(reader)},
        again=finals_file.read_finals(reader),
    )


def _failures(reader: Reader) -> list[Failure]:
    found = []
    for kind, count in reader.failures_by_kind().items():
        (last,) = deque(reader.evaluations("outcome = ?", kind), maxlen=1)
        found.append(Failure(kind, count, (last.error or "")[:200]))
    return found


def _candidates(title: str, rows: list[CandidateRow]) -> SearchTable:
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    names = [n for n in names if any(row.metrics.get(n) != row.fitness for row in rows)]
    header = ("candidate", "fitness", *names, "parent", "mutation")
    return SearchTable(
        title,
        header,
        [
            (
                f"#{row.id}",
                row.fitness,
                *(row.metrics.get(name) for name in names),
                "random" if row.parent is None else f"#{row.parent}",
                row.mutation,
            )
            for row in rows
        ],
    )


def _entry(row: CandidateRow) -> dict[str, Any]:
    return {
        "candidate": row.id,
        "fitness": row.fitness,
        "metrics": finite(row.metrics),
        "parent": row.parent,
        "mutation": row.mutation,
        "architecture": row.architecture,
    }


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"
