"""To search, to load a search of another day, and what either has found.

Everything that is shown of a search is read from its store, also while it goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.ask_tell.limits import Limit
from nas.ask_tell.search import Search
from nas.evaluators import evaluator as evaluators
from nas.reports import lineage as reports_lineage
from nas.spaces import space as spaces
from nas.spaces.space import SPACES, Space
from nas.storage import queries
from nas.storage.reader import FILE, CandidateRow, Counts, EvaluationRow, Reader, Study, store_path
from nas.workers import pools
from nas.workers.driver import Callback, Driver, DriverThread, check_seconds
from nas.workers.pickled_setup import Setup, load_setup

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True)
class Candidate:
    """An architecture that a search has proposed, and what became of it."""

    number: int
    architecture: Any
    fitness: float | None
    metrics: dict[str, float]
    row: CandidateRow = field(repr=False)
    """All that the store has on it."""
    result: "Result" = field(repr=False, compare=False)

    @property
    def lineage(self) -> list["Candidate"]:
        """Its ancestors, from the random one on, and itself last."""
        return self.result.lineage(self.number)

    def plot_lineage(self, path: str | Path | None = None) -> "Figure":
        """Its ancestors, each with what differs from its parent; written to `path` where given."""

        return reports_lineage.figure(self.result.reader, self.number, path)

    def _repr_html_(self) -> str:
        from nas.reports import html

        return html.candidate(self.result.reader, self.row)


class Result:
    """A run: a folder with a search's store, and perhaps a driver that is at work on it.

    `result.best.architecture`, `result.history` (a DataFrame), `result.counts`; with a driver in
    the background also `result.wait()` and `result.stop()`.
    """

    def __init__(
        self,
        path: str | Path,
        space: Space[Any] | None = None,
        running: DriverThread | None = None,
    ) -> None:
        self.path = store_path(path).parent
        self.reader = Reader(path)
        self.study: Study = self.reader.study()
        self._space, self._running = space, running

    def __repr__(self) -> str:
        counts, found = self.counts, next(self.reader.ranked(), None)
        best = f"best fitness {found.fitness:.6g}" if found else "no result yet"
        state = ", running" if self.is_running else ""
        return (
            f"nas.Result({self.study.name!r}: {counts.results} results, {counts.evaluations} "
            f"evaluations, {best}{state})"
        )

    def _repr_html_(self) -> str:
        from nas.reports import html

        return html.result(self.reader)

    # --- what was found ---------------------------------------------------------------------------

    @property
    def space(self) -> Space[Any]:
        """The search's space: one of this package, or else as it was pickled with the run."""
        if self._space is None:
            known = SPACES.get(self.study.space)
            self._space = known() if known else load_setup(self.reader).space
        return self._space

    @property
    def best(self) -> Candidate:
        """The candidate with the best fitness; LookupError if there is none yet."""
        for found in self.top(1):
            return found
        raise LookupError(f"{self.path} has no result yet: wait for the first evaluation")

    def top(self, count: int) -> list[Candidate]:
        """The best candidates of different networks, the best first."""
        return [self._candidate(row) for row in queries.top(self.reader, count)]

    def candidate(self, number: int) -> Candidate:
        """The candidate of that number, as in `history`; KeyError if there is none."""
        return self._candidate(self.reader.candidate(number))

    def lineage(self, number: int) -> list[Candidate]:
        """A candidate's ancestors, from the random one on, and itself last."""
        return [self._candidate(row) for row in self.reader.lineage(number)]

    @property
    def population(self) -> list[Candidate]:
        """The members, the one trained least recently first."""
        return [self._candidate(row) for row in self.reader.population()]

    @property
    def counts(self) -> Counts:
        """How many candidates, evaluations, cache hits and failures there are."""
        return self.reader.counts()

    @property
    def history(self) -> "DataFrame":
        """A row for each candidate, by its number, with a column for each metric.

        A metric that is named as a column of the store is in `candidate(number).metrics` only.
        """
        rows = list(self.reader.candidates())
        metrics = [name for row in rows for name in row.metrics]
        found = [
            {**row.metrics, **row._asdict(), "mutation_kind": _kind(row.mutation)} for row in rows
        ]
        return _frame(found, [*CandidateRow._fields, *metrics, "mutation_kind"])

    @property
    def evaluations(self) -> "DataFrame":
        """A row for each evaluation: its candidate, worker, times (seconds since 1970), outcome.

        And a column for each metric, as in `history`.
        """
        rows = list(self.reader.evaluations())
        metrics = [name for row in rows for name in row.metrics]
        found = [{**row.metrics, **row._asdict()} for row in rows]
        return _frame(found, [*EvaluationRow._fields, *metrics])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Best so far, fitness by age, what the cache saved, the workers, and Pareto fronts.

        From the store, also while the search goes on; written to `path` where given.
        """
        from nas.reports import plots

        return plots.overview(self.reader, path)

    def _candidate(self, row: CandidateRow) -> Candidate:
        architecture = self.space.decode(row.architecture)
        return Candidate(row.id, architecture, row.fitness, row.metrics, row, self)

    # --- the driver -------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether a driver that this process started is at work."""
        return self._running is not None and self._running.is_alive

    def wait(self, timeout_s: float | None = None) -> "Result":
        """Wait for the driver; raises what ended the search, if it was an error."""
        if self._running is not None:
            self._running.wait(timeout_s)
        return self

    def watch(self, every_s: float = 0.5) -> None:
        """Show how the search comes on until it ends, in a line that is renewed.

        In a notebook this returns at once, and the cell is renewed; elsewhere it waits. Raises what
        ended the search, if it was an error, as `wait` does.
        """
        from nas.reports import live

        live.watch(self.path, self._running, every_s)
        if not live.in_notebook():
            self.wait()

    def stop(self) -> "Result":
        """End the search; what is under way is trained anew when the search is resumed."""
        if self._running is not None:
            self._running.stop()
        return self.wait()

    def resume(self, evaluate: Callable[..., Any] | Any = None, **options: Any) -> "Result":
        """Go on, with the evaluator of the run or another, and other `cycles`, `workers`, ...

        The options are those of `nas.search`, but for what the search is: its space and settings.
        """
        setup = load_setup(self.reader, needed=evaluate is None)
        fixed = [name for name in options if name in self.study.settings or name == "space"]
        if fixed:
            raise ValueError(f"{', '.join(fixed)}: a search cannot be resumed with other ones")
        given = {"limits": setup.limits, **setup.options, **self.study.settings, **options}
        return search(
            space=setup.space if setup.space is not None else self.space,
            evaluate=setup.evaluate if evaluate is None else evaluate,
            name=self.path.name,
            folder=self.path.parent,
            other_evaluator=evaluate is not None,
            **given,
        )


def search(
    *,
    space: Any,
    evaluate: Any,
    workers: Any = 1,
    wait: bool = True,
    timeout_s: float | None = None,
    time_limit_s: float | None = None,
    callback: Callback | None = None,
    limits: Sequence[Limit] = (),
    name: str = "search",
    folder: str | Path = "runs",
    other_evaluator: bool = False,
    **options: Any,
) -> Result:
    """Search a space by regularized evolution, in the folder runs/NAME, and return what was found.

    `evaluate` is a function of an architecture that returns its fitness; see `nas.evaluators.evaluator`.
    `workers` are a number of threads, `devices` (a thread for each local accelerator), `processes`,
    the address of a dask scheduler, or an executor.
    With `wait=False` the search goes on in the background. `timeout_s` is for one evaluation,
    `time_limit_s` for all; `callback(search)` is called after each and ends the search by True.
    The rest goes to `nas.Search`: population, sample, cycles, target, seed, maximise, cache, ...

    A search of the same name and settings goes on where it was; with another evaluator, whose
    fitnesses may not compare, only by `other_evaluator=True`. Raises `nas.FailuresError` if the
    evaluator fails too often, and ValueError, or OSError, for what cannot be done at all.
    """
    check_seconds(timeout_s=timeout_s, time_limit_s=time_limit_s)
    space, evaluator = spaces.as_space(space), evaluators.as_evaluator(evaluate)
    driving = {"workers": workers, "timeout_s": timeout_s}
    setup = Setup(space, evaluate, tuple(limits), {**driving, **options})
    policy = options.get("fitness_policy", "stored")
    evaluator = evaluator.in_search(space, Path(folder) / name, policy, timeout_s)
    options.setdefault("compare", evaluator.compares)
    known = {"evaluator": evaluators.identity_of(evaluator), "other_evaluator": other_evaluator}
    loop = Search(
        space=space, name=name, folder=folder, limits=limits, setup=setup.pickled(),
        **known, **options,
    )  # fmt: skip
    pool = None
    try:
        pool = pools.make_pool(workers)
        running = DriverThread(Driver(loop, evaluator, pool, timeout_s, time_limit_s, callback))
    except BaseException:
        loop.close()
        if pool is not None:
            pool.close()
        raise
    result = Result(Path(folder) / name, space, running)
    if wait:
        running.run()
        return result.wait()
    running.start()
    return result


def load(name: str | Path, folder: str | Path = "runs") -> Result:
    """The run of that name, or in that folder, as far as it has come; FileNotFoundError if none."""
    path = Path(name) if (Path(name) / FILE).exists() else Path(folder) / name
    if not (path / FILE).exists():
        there = sorted(found.parent.name for found in Path(folder).glob(f"*/{FILE}"))
        known = f"runs in {folder}: {', '.join(there)}" if there else f"there are none in {folder}"
        raise FileNotFoundError(f"no run {str(name)!r}: no file {path / FILE}; {known}")
    return Result(path)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> "DataFrame":
    """By the column `id`, each column once, also where there is no row."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "a DataFrame needs pandas: pip install 'gpipe-jax[search]'; or read `result.reader`"
        ) from error
    names = [name for name in dict.fromkeys(columns) if name != "metrics"]
    return pandas.DataFrame(rows, columns=names).set_index("id")  # type: ignore[arg-type]


def _kind(mutation: str | None) -> str | None:
    return mutation.partition(":")[0] if mutation else None
