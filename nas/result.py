"""Start a search, load a run, and look at what either has found.

Everything that is shown of a run is read from its store, also while the search is running.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpipe_jax.utils import messages, paths
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import install_advice
from nas import keywords
from nas.ask_tell import arguments, code_changes
from nas.ask_tell.limits import Limit
from nas.ask_tell.search import Search, argument_names
from nas.errors import LostRunError, MismatchError
from nas.evaluators import evaluator as evaluators
from nas.pickles.setup import Setup, load_setup
from nas.reports import tables
from nas.spaces import space as spaces
from nas.spaces.space import Space
from nas.storage import queries
from nas.storage.reader import FILE, CandidateRow, Counts, EvaluationRow, Reader, Study, store_path
from nas.storage.run_folder import run_folder
from nas.workers import main_guard, pools
from nas.workers.driver import Callback, Driver, DriverThread, check_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class Candidate:
    """Hold an architecture that a search has proposed, and its result.

    Attributes:
        number: Number of the candidate, as in `Result.history`.
        fitness: Its newest fitness, or None.
        metrics: Other numbers that the evaluator or the limits recorded.
        row: Its row in the store.
        result: The run.
    """

    number: int
    fitness: float | None
    metrics: dict[str, float]
    row: CandidateRow
    result: "Result" = field(compare=False)

    def __repr__(self) -> str:
        return (
            f"Candidate(number={self.number}, architecture={self.row.architecture!r}, "
            f"fitness={self.fitness!r}, metrics={self.metrics!r})"
        )

    @property
    def architecture(self) -> Any:
        """Return the architecture, a value of the search space; its text is `row.architecture`.

        Raises:
            ValueError: The space is not known here, or it is not that of the run.
        """
        return self.result.decode(self.row)

    @property
    def lineage(self) -> list["Candidate"]:
        """Return the ancestors, the random one first, and the candidate itself last."""
        return self.result.lineage(self.number)

    def plot_lineage(self, path: str | Path | None = None) -> "Figure":
        """Draw the ancestors, each with its differences from its parent.

        Args:
            path: File to write the figure to. Default: none.

        Returns:
            The figure of Matplotlib.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from nas.reports import lineage

        return lineage.figure(self.result.reader, self.number, path, self.result.known_space)

    def _repr_html_(self) -> str:
        from nas.reports import html

        return html.candidate(self.result.reader, self.row, self.result.known_space)


class Result:
    """Read a run, and control its driver if this process has started one.

    `nas.search` and `nas.load` return results. With a driver in the background use `wait`, `watch`
    and `stop`.

    Args:
        path: The run's folder, or its file.
        space: The search space. Default: a built-in one, or the one that was pickled with the run.
        running: The driver, if this process has started one. Default: none.
        trust: Whether to run code that the run holds; see `nas.load`. Default: False.
        setup: Evaluator and limits, if this process has started the search. Default: those that
            were pickled with the run.

    Attributes:
        path: The run's folder.
        reader: The run's store.
        study: Name, space and settings of the search.

    Example::

        result = nas.load("first")
        result.best.architecture, result.best.fitness
        result.history.sort_values("fitness").tail()
        result.resume(cycles=2000)
    """

    def __init__(
        self,
        path: str | Path,
        space: Space[Any] | None = None,
        running: DriverThread | None = None,
        trust: bool = False,
        setup: Setup | None = None,
    ) -> None:
        self.path = store_path(path).parent
        self.reader = Reader(path)
        self.study: Study = self.reader.study()
        self.trust, self._setup = trust, setup
        self._space, self._running = space or code_changes.built_in_space(self.study), running

    def __repr__(self) -> str:
        counts, row = self.counts, next(self.reader.ranked(), None)
        best = f"best fitness {row.fitness:.6g}" if row else "no result yet"
        state = ", running" if self.is_running else ""
        return (
            f"nas.Result({self.study.name!r}: {counts.results} results, {counts.evaluations} "
            f"evaluations, {best}{state})"
        )

    def _repr_html_(self) -> str:
        from nas.reports import html

        return html.result(self.reader, self.known_space)

    # --- candidates -------------------------------------------------------------------------------

    @property
    def space(self) -> Space[Any]:
        """Return the search space: a built-in one, or the one that was pickled with the run.

        Raises:
            ValueError: The space is not built in, and another user stored it, or its module cannot
                be imported here. The message says how to give it.
        """
        if self._space is None:
            self._space = load_setup(self.reader, needed=["space"], trust=self.trust).space
        return self._space

    @property
    def known_space(self) -> Space[Any] | None:
        """Return the search space, or None where `space` raises."""
        try:
            return self.space
        except ValueError:
            return None

    def with_space(self, space: Space[Any]) -> "Result":
        """Return the run with this search space.

        Args:
            space: The space.

        Returns:
            Another result of the same run.

        Raises:
            nas.errors.MismatchError: The space has another name than that of the run.
        """
        if space.name != self.study.space:
            raise MismatchError(
                f"{self.path} holds a search of the space {self.study.space!r}, but the given one "
                f"is {space.name!r}: give the space of the run"
            )
        return Result(self.path, space, self._running, self.trust, self._setup)

    def decode(self, row: CandidateRow) -> Any:
        """Return the architecture of a row of the store.

        Args:
            row: The row.

        Returns:
            The architecture, a value of `space`.

        Raises:
            ValueError: The space is not known here, or it is not that of the run.
        """
        return spaces.decode_stored(self.space, row.architecture)

    @property
    def best(self) -> Candidate:
        """Return the candidate with the best fitness.

        Raises:
            LookupError: No candidate has a fitness yet.
        """
        for candidate in self.top(1):
            return candidate
        raise LookupError(f"{self.path} has no result yet: wait for the first evaluation")

    def top(self, count: int) -> list[Candidate]:
        """Return the best candidates, the best first; of duplicates only the first.

        Args:
            count: Number of candidates, at most.

        Returns:
            The candidates; fewer if not so many have a fitness.

        Raises:
            ValueError: `count` is not a whole number of at least 1.
        """
        check_count("count", count)
        return [self._candidate(row) for row in queries.top(self.reader, int(count))]

    def candidate(self, number: int) -> Candidate:
        """Return the candidate of this number.

        Args:
            number: Number of the candidate, as in `history`.

        Returns:
            The candidate, also if it has no fitness.

        Raises:
            KeyError: There is no candidate of this number.
            ValueError: `number` is not a whole number of at least 0.
        """
        check_count("number", number, minimum=0)
        return self._candidate(self.reader.candidate(int(number)))

    def lineage(self, number: int) -> list[Candidate]:
        """Return a candidate's ancestors, the random one first, and itself last.

        Args:
            number: Number of the candidate.

        Returns:
            The ancestors and the candidate.

        Raises:
            KeyError: There is no candidate of this number.
            ValueError: `number` is not a whole number of at least 0.
        """
        check_count("number", number, minimum=0)
        return [self._candidate(row) for row in self.reader.lineage(int(number))]

    @property
    def population(self) -> list[Candidate]:
        """Return the members of the population, the one trained least recently first."""
        return [self._candidate(row) for row in self.reader.population()]

    @property
    def counts(self) -> Counts:
        """Count candidates, evaluations, cache hits and failures."""
        return self.reader.counts()

    @property
    def history(self) -> "DataFrame":
        """Return a row for each candidate, by its number, with a column for each metric.

        The column of a metric has its name, or `metric NAME` if the table has a column NAME anyway.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = list(self.reader.candidates())
        records = [{**row._asdict(), "mutation_kind": _kind(row.mutation)} for row in rows]
        return _frame(records, [*CandidateRow._fields, "mutation_kind"])

    @property
    def evaluations(self) -> "DataFrame":
        """Return a row for each evaluation: candidate, worker, times, outcome, metrics.

        Times are seconds since 1970. There is a column for each metric, as in `history`.

        Raises:
            ImportError: pandas is not installed.
        """
        records = [row._asdict() for row in self.reader.evaluations()]
        return _frame(records, EvaluationRow._fields)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot the best fitness, fitness by age, cache hits, workers and Pareto fronts.

        The search may be running.

        Args:
            path: File to write the figure to. Default: none.

        Returns:
            The figure of Matplotlib.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        from nas.reports import plots

        return plots.overview(self.reader, path)

    def _candidate(self, row: CandidateRow) -> Candidate:
        return Candidate(row.id, row.fitness, row.metrics, row, self)

    def copy_to(self, folder: str | Path) -> "Result":
        """Copy the run, also while a driver is writing to it.

        Use this rather than a copy of `search.sqlite` alone: after a driver was killed, its last
        results are in a file beside it. Trained weights are copied as they are at this moment, so
        stop a search with `retrain_warm` first.

        Args:
            folder: The folder of the copy, which must not exist.

        Returns:
            The copy.

        Raises:
            FileExistsError: The folder exists.
            ValueError: It is in the run's folder.

        Example::

            nas.load("first").copy_to("/backup/first")
        """
        self.reader.copy_run_to(paths.local("folder", folder))
        return Result(paths.local("folder", folder), self._space)

    # --- the driver -------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Return whether a driver that this process started in the background is running."""
        return self._running is not None and self._running.is_alive

    def wait(self, timeout_s: float | None = None) -> "Result":
        """Wait for the driver to end, and raise the error that ended the search, if any.

        Args:
            timeout_s: Longest time to wait, in seconds; default: no limit.

        Returns:
            This result.

        Raises:
            nas.errors.LostRunError: The run's folder was removed. This result reads the copy then.
            ValueError: `timeout_s` is not a number of seconds.
        """
        check_seconds(timeout_s=timeout_s)
        if self._running is not None:
            try:
                self._running.wait(timeout_s)
            except LostRunError as error:
                if error.copy is not None:
                    self.path, self.reader = Path(error.copy), Reader(error.copy)
                raise
        return self

    def watch(self, every_s: float = 0.5) -> None:
        """Show the progress of the search in one line until it ends.

        In a notebook this returns at once, and the cell is updated. Elsewhere it waits, and raises
        the error that ended the search, as `wait` does.

        Args:
            every_s: Seconds between updates. Default: 0.5.

        Raises:
            ValueError: `every_s` is not a number of seconds.
        """
        from nas.reports import live

        check_seconds(every_s=every_s)

        live.watch(self.path, self._running, every_s)
        if not live.in_notebook():
            self.wait()

    def stop(self) -> "Result":
        """End the search; jobs that are running are repeated when the search is resumed.

        Returns:
            The result itself, with what is finished.
        """
        if self._running is not None:
            self._running.stop()
        return self.wait()

    def resume(self, evaluate: Callable[..., Any] | Any = None, **options: Any) -> "Result":
        """Resume the search.

        Args:
            evaluate: An evaluator; default: the one that was pickled with the run, unless it is
                large or another user stored it. Another one is accepted, even if its fitness
                cannot be compared with that of the run.
            **options: Arguments of `nas.search`, such as `cycles` and `workers`, that differ from
                those of the run. A run driven by an executor or a client of dask needs `workers`.
                Settings and the space's name cannot differ.

        Returns:
            The result; see `nas.search`.

        Raises:
            ValueError: An option is fixed, or the run's evaluator must be given again; the message
                says why.

        Example::

            nas.load("first").resume(cycles=2000, workers=8)
        """
        if "space" in options:
            space = spaces.as_space(options.pop("space"))
            return self.with_space(space).resume(evaluate, **options)
        needed = [] if self._space else ["space"]
        if evaluate is None and self._setup is None:
            needed.append("evaluate")
        if self.study.limits != [] and "limits" not in options and self._setup is None:
            needed.append("limits")
        setup = load_setup(self.reader, needed=needed, trust=self.trust)
        if self._setup is not None:
            setup = self._setup._replace(options=setup.options)
        own = {"name": self.path.name, "folder": str(self.path.parent)}
        if "folder" in options:
            options["folder"] = str(_local("folder", options["folder"]))
        _check_fixed(options, {**self.study.settings, **own})
        options = {name: value for name, value in options.items() if name not in own}
        stored = {"limits": setup.limits, **setup.options, **self.study.settings}
        if setup.options and "workers" not in {**stored, **options}:
            raise ValueError(
                "workers: the run was driven by an executor or a dask client, which cannot be "
                "stored: give it again, or other workers, as in resume(workers=4)"
            )
        return search(
            space=self._space or setup.space,
            evaluate=setup.evaluate if evaluate is None else evaluate,
            name=self.reader.file.parent.name,
            folder=self.reader.file.parent.parent,
            **{"other_evaluator": evaluate is not None, **stored, **options},
        )


def _check_fixed(given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError for options of a resumed search that differ from those of the run."""
    different = [
        f"{name} {value!r}: the run has {fixed[name]!r}"
        for name, value in given.items()
        if name in fixed and value != fixed[name]
    ]
    if different:
        raise ValueError(
            f"{'; '.join(different)}; a search cannot be resumed with other ones: leave them out, "
            "or start a search of another name"
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
    other_space: bool = False,
    **options: Any,
) -> Result:
    """Search a space by regularized evolution (Real et al. 2019, arXiv:1802.01548).

    The run is stored in FOLDER/NAME. A search of the same name and settings resumes where the last
    one stopped.

    Args:
        space: The search space, or the name of a built-in one: nasnet, nasbench201.
        evaluate: A function of an architecture that returns its fitness or a dict with `fitness`
            and other metrics; an object with a method `evaluate(job)`; or a `nas.Evaluator`.
        workers: Who evaluates. A number of threads; "devices", a thread for each local
            accelerator; "processes" or "processes:4"; the address of a dask scheduler; a dask
            client; or an executor. Default: 1.
        wait: Whether to return after the search. Otherwise it runs in the background. Default:
            True.
        timeout_s: Seconds for one evaluation, after which it fails. Default: no limit.
        time_limit_s: Seconds for the whole call. The search can be resumed. Default: no limit.
        callback: Called with the `nas.Search` after each report; True ends the search.
            Default: none.
        limits: Architectures beyond these are rejected before they are evaluated. Default: none.
        name: Name of the run. Default: "search".
        folder: Folder of runs, on a local disk. Default: "runs".
        other_evaluator: Whether a run by another evaluator may be resumed, or by one whose code has
            changed, although its fitness may not be comparable. Default: False.
        other_space: Whether a run may be resumed although the code of the space has changed.
            `nas.replay` may not follow such a run. Default: False.
        **options: Other arguments of `nas.Search`:

            - cycles: Number of candidates with a fitness at which the search is over, with answers
              of the cache; default 1000, or ten times `evaluations`.
            - evaluations: Number of evaluations with a fitness at which the search is over;
              default: no limit.
            - target: Fitness that ends the search earlier; default: none.
            - cache: Whether duplicates are evaluated only once, or the number of evaluations after
              which their mean answers; default True.
            - retries: Retries for each kind of failure; default `nas.Retries()`.
            - max_failures: Number of failures in a row that end the search; default 10.
            - directions: What is better in metrics of which reports show a Pareto front, such as
              `{"latency_ms": "min", "top5": "max"}`; default: those of the run, or less is better
              in metrics with names such as `params_m` or `latency_ms`.
            - compare: Metric of the population that jobs get as `Job.rivals`; default: the
              evaluator's `rivals_metric`.
            - population, sample, seed, maximise, replacement, algorithm, fitness_policy: Fields of
              `nas.Settings`.

    Returns:
        The run. With `wait=False` it can be read while the search is running.

    Raises:
        nas.FailuresError: Too many evaluations have failed, or too many candidates were rejected,
            in a row.
        nas.errors.LostWeightsError: With `retrain_warm`, a worker's trained weights are missing.
        nas.errors.ReturnError: The evaluator returned no fitness, and has never returned one.
        nas.errors.MismatchError: The folder holds another search, or results of other code.
        nas.errors.LostRunError: The folder was removed while the search was running.
        nas.errors.SearchInUseError: Another driver has the run open.
        nas.errors.WorkersError: The workers cannot be started or reached.
        ValueError, TypeError, OSError: An argument cannot be used; the message says how to correct
            it.

    Example::

        result = nas.search(
            space=nas.NASNetSpace(), evaluate=my_function, population=100, sample=25,
            cycles=1000, workers=8, name="first",
        )
        result.best.architecture
    """
    main_guard.check_not_importing()
    keywords.check_names("nas.search", options, _search_arguments())
    check_seconds(timeout_s=timeout_s, time_limit_s=time_limit_s)
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback {callback!r} cannot be called; give a function of a nas.Search")
    folder = _local("folder", folder)
    run = run_folder(folder, name)
    space, evaluator = spaces.as_space(space), evaluators.as_evaluator(evaluate)
    stored_options = {"workers": workers, "timeout_s": timeout_s, **options}
    setup = Setup(space, evaluate, arguments.as_limits(limits), stored_options)
    code = code_changes.code_of(space, setup.limits, evaluate)
    policy = options.get("fitness_policy", "stored")
    evaluator = evaluators.prepared(evaluator, space, run, policy, timeout_s)
    options.setdefault("compare", evaluator.rivals_metric)
    options.setdefault("lease_s", None)  # the driver knows which jobs are running
    loop = Search(
        space=space,
        name=name,
        folder=folder,
        limits=limits,
        setup=setup.pickled(),
        code=code,
        evaluator=evaluators.identity_of(evaluator),
        other_evaluator=other_evaluator,
        other_space=other_space,
        **options,
    )
    if loop.evolution.results:
        done = loop.length.done(loop.evolution.results, loop.evaluated)
        _say(f"{run}: {done} of {loop.length.total} {loop.length.noun} found")
    pool = None
    try:
        pool = pools.make_pool(workers)
        running = DriverThread(Driver(loop, evaluator, pool, timeout_s, time_limit_s, callback))
    except BaseException:
        loop.close()
        if pool is not None:
            pool.close()
        raise
    result = Result(run, space, running, trust=True, setup=setup)
    if wait:
        running.run()
        return result.wait()
    running.start()
    return result


def _say(text: str) -> None:
    """Write a line for the user, in a notebook beneath the cell."""
    from nas.reports import live

    if live.in_notebook():
        messages.write(text)
    else:
        messages.say(text, "nas")


def _search_arguments() -> list[str]:
    """Return the names of all arguments of `search` that users give."""
    names = [*keywords.names_of(search), *argument_names()]
    return [name for name in names if name not in ("setup", "evaluator", "code")]


def load(
    name: str | Path,
    folder: str | Path = "runs",
    *,
    space: Any = None,
    trust: bool = False,
) -> Result:
    """Load a run, also while a driver is writing to it.

    Reading a run does not run its code. Only a space and an evaluator that are pickled in it run
    code. They need `trust=True`, unless this user has stored the same on this machine.

    Args:
        name: Name of the run in `folder`, or the path of its own folder.
        folder: Folder of runs. Default: "runs".
        space: The search space, for architectures. Default: a built-in one, or the one that was
            pickled with the run.
        trust: Whether to run code that the run holds, whoever has made it. Default: False.

    Returns:
        The run, which may be unfinished.

    Raises:
        FileNotFoundError: The run does not exist; the message lists those that do.
        nas.errors.MismatchError: The run is of a space with another name.

    Example::

        nas.load("first").best
    """
    own, folder = _local("name", name), _local("folder", folder)
    is_below = own.parts and not own.is_absolute() and ".." not in own.parts
    path = folder / own if is_below and not (own / FILE).exists() else own
    if not (path / FILE).exists():
        runs = sorted(file.parent.name for file in folder.glob(f"*/{FILE}"))
        known = f"has: {', '.join(runs)}" if runs else "has no searches"
        raise FileNotFoundError(
            f"no run {str(name)!r}: {path / FILE} does not exist; the folder {folder} {known}"
        )
    result = Result(path, trust=trust)
    return result if space is None else result.with_space(spaces.as_space(space))


def _local(argument: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} {path!r}: expected a text or a path")
    return paths.local(argument, path)


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> "DataFrame":
    """Return a table indexed by the column `id`, also without rows.

    The column `metrics` becomes a column for each metric.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f"a DataFrame needs pandas: {install_advice('search')}, or read `result.reader`"
        ) from error
    labels = tables.metric_labels([name for row in rows for name in row["metrics"]], columns)
    records = [
        {**row, **{labels[name]: value for name, value in row["metrics"].items()}} for row in rows
    ]
    names = [*(name for name in columns if name != "metrics"), *labels.values()]
    return pandas.DataFrame(records, columns=names).set_index("id")  # type: ignore[arg-type]


def _kind(mutation: str | None) -> str | None:
    return mutation.partition(":")[0] if mutation else None
