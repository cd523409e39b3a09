"""Run a search as an open loop: `ask` returns a job to train, `tell` takes its fitness.

    search = nas.Search(space=nas.NASNetSpace(), name="first", population=100, sample=25)
    while (job := search.ask()) is not None:
        search.tell(job, accuracy(job.architecture))

Any number of jobs may run at once; `tell` takes them in any order, from any thread. Every change is
written to the store before memory changes, so that a search of the same name resumes where the last
driver stopped. A candidate passes through these methods of `nas.ask_tell.candidates`:

    advance --> propose --> schedule --> answered by the cache ------------> add_member
       |           |          ^   |                                             ^
       |           v          |   +--> queue --> ask --> job --> tell, report --+
       |   the space raises:  |          ^        |                |        |
       |   skipped            |          |        v                |        |
       |                      |          |  beyond a limit:        |        |
       |                      |          |  rejected               |        |
       |                      |          +----- retry after a failure       |
       |                      +------- a duplicate that waited -------------+
       +--> tournament: retrainings, before the proposal
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nas import keywords
from nas.ask_tell import arguments, code_changes, leases, reopening
from nas.ask_tell.candidates.measurements import Measurements
from nas.ask_tell.candidates.memory import Memory
from nas.ask_tell.candidates.proposals import Proposals
from nas.ask_tell.candidates.results import Results
from nas.ask_tell.candidates.schedule import Schedule
from nas.ask_tell.code_changes import Code
from nas.ask_tell.leases import LEASE_S
from nas.ask_tell.limits import Limit, LimitCheck, Retries
from nas.choices import Direction
from nas.evaluators import outcomes
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Settings
from nas.evolution.length import length
from nas.spaces import space as spaces
from nas.storage.run_folder import run_folder


class Search:
    """Run regularized evolution with a store, a cache, limits and retries, as an open loop.

    Args:
        space: The search space, or the name of a built-in one: nasnet, nasbench201.
        name: Name of the run; its folder is FOLDER/NAME. Default: "search".
        folder: Folder of runs, on a local disk. Default: "runs".
        cycles: Number of candidates with a fitness at which the search is over. Answers of the
            cache count too. Default: 1000, or ten times `evaluations`.
        evaluations: Number of evaluations with a fitness at which the search is over. Failures and
            answers of the cache do not count; members that are trained again do. Default: no limit.
        target: Fitness that ends the search earlier. Default: none.
        cache: Whether duplicates are evaluated only once, or the number of evaluations after which
            their mean answers. Default: True.
        limits: Architectures beyond these are rejected before training. Default: none.
        retries: Number of retries for each kind of failure. Default: `nas.Retries()`.
        max_failures: Number of failures in a row that end the search. Default: 10.
        lease_s: Seconds after which a job that was not told may be asked again, if there is nothing
            else to do; None for no limit. Whoever tells first counts. Default: 3600.
        directions: Metrics whose Pareto front reports show, and what is better in each, such as
            {"latency_ms": "min", "top5": "max"}. They do not change the search. Default: those of
            the run, or less is better in metrics with names such as `params_m` or `latency_ms`.
        compare: Metric of the population's members that jobs get as `Job.rivals`. Default: none.
        setup: Space, evaluator and limits, pickled, for `Result.resume`. Default: none.
        evaluator: What the fitness depends on (`nas.evaluators.evaluator.identity_of`); a store
            with other values is refused. Default: unknown, which fits every store.
        code: Fingerprints of what the search runs (`nas.ask_tell.code_changes.code_of`). Default:
            those of space and limits.
        other_evaluator: Whether the evaluator, its code or that of the limits may differ from the
            store's. Default: False.
        other_space: Whether the code of the space may differ from the store's. Default: False.
        **settings: Fields of `nas.Settings`: population, sample, seed, maximise, replacement,
            algorithm, fitness_policy. Without `population`, a search of fewer than 100 cycles or
            evaluations has half as many members, and a sample of a quarter of them.

    Attributes:
        store: The run's store, to read from.
        evolution: The population.
        evaluated: Number of evaluations with a fitness so far.
        best_fitness: The best fitness so far, or None.

    Raises:
        ValueError: An argument is not legal.
        nas.errors.MismatchError: The folder holds another search.
        nas.errors.SearchInUseError: Another driver has the store open.
        nas.errors.NetworkFileSystemError: The folder is on a network file system.

    Example:
        >>> import tempfile, nas
        >>> options = {"population": 2, "sample": 2, "cycles": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with nas.Search(space="nasbench201", folder=folder, **options) as search:
        ...         while (job := search.ask()) is not None:
        ...             search.tell(job, {"fitness": sum(job.architecture), "epochs": 20})
        ...         search.is_over
        True
    """

    def __init__(
        self,
        *,
        space: Any,
        name: str = "search",
        folder: str | Path = "runs",
        cycles: int | None = None,
        evaluations: int | None = None,
        target: float | None = None,
        cache: bool | int = True,
        limits: Sequence[Limit] = (),
        retries: Retries | None = None,
        max_failures: int = 10,
        lease_s: float | None = LEASE_S,
        directions: Mapping[str, Direction] | None = None,
        compare: str | None = None,
        setup: bytes | None = None,
        evaluator: Mapping[str, Any] | None = None,
        code: Code | None = None,
        other_evaluator: bool = False,
        other_space: bool = False,
        **settings: Any,
    ) -> None:
        keywords.check_names("nas.Search", settings, argument_names())
        self.space, self.length = spaces.as_space(space), length(cycles, evaluations)
        self.settings = arguments.settings(settings, self.length, run_folder(folder, name))
        arguments.check(
            cache=cache,
            max_failures=max_failures,
            target=target,
            lease_s=lease_s,
            retries=retries,
            compare=compare,
            directions=directions,
        )
        self.cycles, self.target = self.length.cycles, target
        self.limit_check = LimitCheck(arguments.as_limits(limits))
        identity = reopening.Identity(
            self.space.name,
            {**self.settings.to_dict(), "cache": int(cache)},
            [limit.identity for limit in self.limit_check.limits],
            code or code_changes.code_of(self.space, self.limit_check.limits),
            evaluator,
        )
        other = reopening.others(evaluate=other_evaluator, space=other_space)
        self.store = reopening.open_store(run_folder(folder, name), name, identity, setup, other)
        self._lock = threading.RLock()
        try:
            if directions is not None:
                self.store.set_directions(directions)
            self._memory = Memory(
                self.store,
                self.space,
                self.settings,
                self.limit_check,
                cache=int(cache),
                lease_s=lease_s,
                compare=compare,
            )
            self.evolution = self._memory.evolution
            self._run = leases.identity(self.store.study())
            self._schedule = Schedule(self._memory, self._run)
            self._proposals = Proposals(self._memory, self._schedule, max_failures)
            self._results = Results(
                self._memory, self._schedule, self._proposals, retries or Retries(), max_failures
            )
            self._measurements = Measurements(
                self._memory, self._schedule, self._results, self._unlocked
            )
            self._proposals.restore()
        except BaseException:
            self.store.close()
            raise

    def ask(self, until: Callable[[], bool] = lambda: False) -> Job | None:
        """Return the next job.

        The cache may answer many candidates before one is to be evaluated. Limits are measured
        here, and other threads may ask and tell meanwhile.

        Args:
            until: Called between candidates; if it returns True, `ask` returns None. Default: a
                function that returns False.

        Returns:
            The job; None if the search is over, or has no other job until a running one is told.
            A job that was never told is returned again after `lease_s` seconds.

        Raises:
            nas.FailuresError: Too many candidates were rejected, or have failed, in a row.
        """
        memory = self._memory
        with self._lock:
            self._schedule.schedule()
            while not (memory.is_closed or self.is_over or until()):
                self.limit_check.check_rejections()
                if self._is_budget_taken():
                    return self._schedule.start_expired()
                if memory.queue:
                    job = memory.queue.popleft()
                    if self._measurements.are_kept(job):
                        if not self._is_budget_taken():
                            return self._schedule.start(job)
                        memory.queue.appendleft(job)  # others asked meanwhile
                elif self._proposals.open < self.cycles:
                    self._proposals.advance()
                else:
                    return self._schedule.start_expired()
        return None

    def _is_budget_taken(self) -> bool:
        """Return whether the evaluations that run are the last ones, if none of them fails."""
        budget, running = self.length.evaluations, self._memory.leases.running
        return budget is not None and self.evaluated + len(running) >= budget

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let other threads ask and tell meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def tell(self, job: Job, fitness: float | Mapping[str, Any]) -> None:
        """Take the fitness of a job.

        A job that was told before, or that belongs to an earlier driver, changes nothing.

        Args:
            job: What `ask` returned.
            fitness: A number, or a dict with `fitness`, other metrics, and `trained_values` (a text
                that says where the trained weights are). The worst fitness, -inf if the search
                maximises, is a result. NaN and the other infinity are failures.

        Raises:
            nas.errors.ReturnError: It is neither.
            nas.errors.MismatchError: The job belongs to another search.
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        arguments.check_report(job)
        self.report(job, outcomes.as_outcome(fitness, job))

    def report(self, job: Job, outcome: Outcome) -> None:
        """Take the outcome of a job, which may be a failure.

        Args:
            job: What `ask` returned.
            outcome: Its outcome, of kind `ok` or one of `nas.evaluators.evaluator.FAILURES`.

        Raises:
            nas.errors.MismatchError: The job belongs to another search.
            nas.FailuresError: This failure is one too many.
            nas.errors.LostWeightsError: The trained weights are missing; nothing is written then.
        """
        arguments.check_report(job, outcome)
        leases.check_run(job, self._run)
        with self._lock:
            if self._memory.is_closed:
                raise ValueError(
                    f"the search is closed, and the result of candidate {job.candidate} is not "
                    "stored: tell it before `close`, or open the search again"
                )
            # The caller may have changed its own job.
            running = self._memory.leases.running.get(job.evaluation)
            if running is not None:
                self._results.end(running, outcome)
                return
            with self.store.change("late", job.candidate, evaluation=job.evaluation):
                pass

    def fail(self, job: Job, error: BaseException | str) -> None:
        """Take the failure of a job, by an error or its text; the search may repeat the job.

        Args:
            job: What `ask` returned.
            error: What went wrong. Its type decides the kind of failure; a text is an exception.

        Raises:
            nas.errors.MismatchError: The job belongs to another search.
            nas.FailuresError: This failure is one too many.
        """
        if isinstance(error, str):
            self.report(job, Outcome("exception", error=error))
        elif isinstance(error, BaseException):
            self.report(job, outcomes.failed_outcome(error))
        else:
            raise TypeError(f"error {error!r}: expected an exception, or a text")

    @property
    def evaluated(self) -> int:
        """Return the number of evaluations with a fitness so far."""
        return self._memory.evaluated

    @property
    def best_fitness(self) -> float | None:
        """Return the best fitness so far, or None."""
        return self._memory.best_fitness

    @property
    def is_over(self) -> bool:
        """Return whether there are enough results or evaluations, or one meets the target."""
        if self.evolution.results >= self.cycles:
            return True
        budget = self.length.evaluations
        if budget is not None and self.evaluated >= budget:
            return True
        if self.target is None or self.best_fitness is None:
            return False
        return not self.settings.better(self.target, self.best_fitness)

    def close(self) -> None:
        """Close the store, so that another driver can open it."""
        with self._lock:
            self._memory.is_closed = True
            self.store.close()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def argument_names() -> list[str]:
    """Return the names of the arguments of `Search`, with those of `nas.Settings`."""
    return [*keywords.names_of(Search), *keywords.names_of(Settings)]
