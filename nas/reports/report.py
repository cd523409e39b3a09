"""Summarize a run: what was searched, how it went, and the best candidates.

Everything is read from the store at one moment, so a running search can be reported on. Only what
an export trained again is in a file of its own.
"""

import time
from collections import deque
from typing import Any, NamedTuple

from gpipe_jax.utils.text import figures_table
from nas.choices import Direction
from nas.reports.tables import SearchTable, as_text, finite, finite_or_none, metric_labels
from nas.storage import finals_file, queries
from nas.storage.reader import CandidateRow, Counts, Reader, Study

BEST_ROWS, FRONT_ROWS = 10, 10  # that are shown


class Failure(NamedTuple):
    """Hold a kind of failure, how often it occurred, and the last error."""

    kind: str
    count: int
    error: str


class Report(NamedTuple):
    """Summarize a run, as text by `str`, and as plain values by `to_dict`."""

    study: Study
    path: str
    counts: Counts
    is_running: bool  # a driver is running
    work_s: float  # time with a driver running
    failures: list[Failure]
    best: list[CandidateRow]  # with different networks
    fronts: dict[str, list[CandidateRow]]  # by metric
    directions: dict[str, Direction]  # what is better in these metrics
    retrained: list[finals_file.Retrained]  # by `nas export`

    def facts(self) -> dict[str, Any]:
        """Return the study and its numbers, by name."""
        counts, settings = self.counts, dict(self.study.settings)
        aim = "maximise" if settings.pop("maximise") else "minimise"
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.study.created))
        return {
            "run": self.path,
            "state": "running" if self.is_running else "not running",
            "space": self.study.space,
            "settings": ", ".join([aim, *(f"{k} {v}" for k, v in settings.items())]),
            "started": f"{started}; {self.work_s:.1f} s running",
            "candidates": f"{counts.proposed} proposed, {counts.results} with a fitness, "
            f"{counts.rejected} beyond a limit, {counts.failed} given up",
            "evaluations": f"{counts.evaluations} done, {counts.failures} failed{self._running()}",
            "cache hits": f"{counts.cache_hits} ({_percent(counts.cache_hits, counts.results)} of "
            "the candidates with a fitness)",
        }

    def _running(self) -> str:
        running = self.counts.running
        if running == 0:
            return ""
        if self.is_running:
            return f", {running} running"
        return f", {running} running when the last driver ended"

    def tables(self) -> list[SearchTable]:
        """Return the failures, the best candidates, those trained again, and the fronts."""
        tables = []
        if self.failures:
            tables.append(SearchTable("failures", ("kind", "count", "last error"), self.failures))
        if self.best:
            tables.append(_candidates("best candidates", self.best))
        if self.retrained:
            rows = [(f"#{each.candidate}", each.epochs, each.fitness) for each in self.retrained]
            tables.append(SearchTable("trained again", ("candidate", "epochs", "fitness"), rows))
        for metric, rows in self.fronts.items():
            more = " (more is better)" if self.directions[metric] == "max" else ""
            title = f"Pareto front, fitness against {metric}{more}: {len(rows)} candidates"
            if len(rows) > FRONT_ROWS:
                title += f", the {FRONT_ROWS} best"
            tables.append(_candidates(title, rows[:FRONT_ROWS]))
        return tables

    def __str__(self) -> str:
        facts = f"search {self.study.name}\n{figures_table(self.facts())}"
        return "\n\n".join([facts, *map(as_text, self.tables())])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can represent."""
        best = self.best[0] if self.best else None
        return {
            "run": self.path,
            "name": self.study.name,
            "space": self.study.space,
            "settings": self.study.settings,
            "is_running": self.is_running,
            "wall_s": self.work_s,
            **self.counts._asdict(),
            "failures_by_kind": {failure.kind: failure.count for failure in self.failures},
            "best_fitness": finite_or_none(best.fitness) if best else None,
            "best": [_entry(row) for row in self.best],
            "trained_again": [finite(each._asdict()) for each in self.retrained],
            "directions": self.directions,
            "pareto": {name: [_entry(row) for row in rows] for name, rows in self.fronts.items()},
        }


def report(reader: Reader) -> Report:
    """Build the report of a run; pass a `Snapshot` while its driver is running."""
    directions = queries.front_metrics(reader)
    fronts = {
        metric: list(queries.pareto_front(reader, metric, direction))
        for metric, direction in directions.items()
    }
    return Report(
        study=reader.study(),
        path=str(reader.path.parent),
        counts=reader.counts(),
        is_running=queries.is_running(reader),
        work_s=queries.work_s(reader),
        failures=_failures(reader),
        best=queries.top(reader, BEST_ROWS),
        fronts=fronts,
        directions=directions,
        retrained=finals_file.read_finals(reader),
    )


def _failures(reader: Reader) -> list[Failure]:
    failures = []
    for kind, count in reader.failures_by_kind().items():
        (last,) = deque(reader.evaluations("outcome = ?", kind), maxlen=1)
        failures.append(Failure(kind, count, (last.error or "")[:200]))
    skipped, reason = reader.skips()
    if skipped:
        failures.append(Failure("skipped proposal", skipped, reason[:200]))
    return failures


def _candidates(title: str, rows: list[CandidateRow]) -> SearchTable:
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    # A metric that equals the fitness in every row would be a second column of it.
    names = [n for n in names if any(row.metrics.get(n) != row.fitness for row in rows)]
    own = ("candidate", "fitness", "parent", "mutation")
    header = (*own[:2], *metric_labels(names, own).values(), *own[2:])
    cells = [
        (
            f"#{row.id}",
            row.fitness,
            *(row.metrics.get(name) for name in names),
            "random" if row.parent is None else f"#{row.parent}",
            row.mutation,
        )
        for row in rows
    ]
    return SearchTable(title, header, cells)


def _entry(row: CandidateRow) -> dict[str, Any]:
    return {
        "candidate": row.id,
        "fitness": finite_or_none(row.fitness),
        "metrics": finite(row.metrics),
        "parent": row.parent,
        "mutation": row.mutation,
        "architecture": row.architecture,
    }


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"
