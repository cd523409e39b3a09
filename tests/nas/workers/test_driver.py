"""Run whole searches on workers of every kind, with failures, and resume them."""

import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from paths import HELPERS
from searches import Bits, ones

import nas
from nas import errors as nas_errors
from nas.errors import MismatchError, ReturnError
from nas.evaluators.evaluator import Function
from nas.pickles import sending
from nas.workers import asking, dask, driver, pools
from nas.workers import task as workers
from nas.workers.driver import Driver, DriverThread

SMALL = {"space": Bits(), "population": 8, "sample": 3, "cycles": 60, "cache": False}


def run(folder, evaluate=ones, **options) -> nas.Result:
    return nas.search(evaluate=evaluate, folder=folder, **{**SMALL, **options})


def check(result: nas.Result, results: int = 60) -> None:
    """Check that nothing is lost or counted twice, and that the log agrees."""
    counts = result.counts
    assert counts.results == results and counts.running == 0
    assert counts.proposed == results + counts.failed + counts.rejected
    assert counts.evaluations + counts.cache_hits == results
    assert len(result.population) == 8
    nas.replay(result.reader, result.space)


def test_threads(tmp_path) -> None:
    def slow(bits) -> float:
        names.add(threading.current_thread().name)
        time.sleep(0.005)
        return ones(bits)

    names: set[str] = set()
    result = run(tmp_path, slow, workers=4)
    check(result)
    assert len(names) == 4
    assert set(result.evaluations["worker"]) == names
    assert all(result.evaluations["finished"] >= result.evaluations["started"])


def test_any_executor(tmp_path) -> None:
    with ThreadPoolExecutor(3) as executor:
        check(run(tmp_path, workers=executor))
        assert executor.submit(int).result() == 0  # the caller shuts it down

    class Unsized(pools.DaemonThreads):
        pass

    with pytest.raises(
        ValueError,
        match=r"does not say how many jobs it runs at once: give an executor with max_workers",
    ):
        pools.make_pool(Unsized())
    check(run(tmp_path / "unsized", workers=pools.of_executor(Unsized(), slots=2)))


def test_the_time_of_a_job_begins_on_the_executor(tmp_path) -> None:
    """Submit four jobs at once to one thread: those that wait do not run out of time."""

    def slow(bits) -> float:
        time.sleep(0.2)
        return ones(bits)

    with ThreadPoolExecutor(1, "mine") as executor:
        pool = pools.of_executor(executor, slots=4)
        result = run(tmp_path, slow, workers=pool, timeout_s=0.6, cycles=10)
    check(result, 10)
    assert result.counts.failures == 0
    assert set(result.evaluations["worker"]) == {"mine_0"}


def test_history_without_rows_and_with_metrics_named_as_columns(tmp_path) -> None:
    with nas.Search(folder=tmp_path, **SMALL) as search:
        result = nas.load("search", tmp_path)
        assert len(result.history) == len(result.evaluations) == 0
        assert {"parent", "fitness", "mutation_kind"} <= set(result.history.columns)
        search.tell(search.ask(), {"fitness": 1.0, "id": 7, "parent": 8, "state": 9, "loss": 3})
    (row,) = result.history.to_dict("records")
    assert list(result.history.index) == [0] and row["parent"] is None and row["state"] == "done"
    assert (row["loss"], row["metric parent"], row["metric id"], row["metric state"]) == (
        3,
        8,
        7,
        9,
    )


def test_repeats_keep_the_last_trained_values_and_metrics_of_some() -> None:
    class SometimesLoss:
        def evaluate(self, job):
            returned = {"fitness": job.seed, "trained_values": str(job.seed)}
            return {**returned, "loss": job.seed} if job.seed else returned

    outcome = nas.Repeated(SometimesLoss(), 3).evaluate(nas.Job(1, 0, (), 0))
    assert outcome["loss"] == 1.5 and outcome["trained_values"] == "2" and outcome["fitness"] == 1


class Few(Bits):
    """Have only four canonical forms, so that the cache soon has all."""

    def canonical(self, bits):
        return str(bits[:2])


@pytest.mark.parametrize("by", ["callback", "time", "stop"])
def test_a_search_can_be_ended_while_the_cache_answers(tmp_path, by) -> None:
    def ends(search) -> bool:
        seen.append(search.evolution.results)
        if by == "time":
            time.sleep(0.05)
        if by == "stop" and len(seen) > 50:
            running[0].stop()
        return by == "callback" and len(seen) > 50

    seen: list[int] = []
    running: list = []
    options = {"space": Few(), "cache": True, "cycles": 5000, "callback": ends}
    if by == "time":
        options["time_limit_s"] = 2.0
    if by == "stop":
        search = nas.Search(
            folder=tmp_path, **{**SMALL, "cache": True, "space": Few(), "cycles": 5000}
        )
        pool = pools.make_pool(1)
        running.append(
            DriverThread(Driver(search, Function(lambda bits: 1.0), pool, callback=ends))
        )
        running[0].run()
        assert 50 <= nas.load("search", tmp_path).counts.results < 70
        return
    result = run(tmp_path, lambda bits: 1.0, **options)
    assert result.counts.results < 70 and result.counts.cache_hits > 0


def test_an_evaluator_that_cannot_be_pickled(tmp_path) -> None:
    lock = threading.Lock()

    def locked(bits) -> float:
        with lock:
            return ones(bits)

    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor,
        pytest.raises(
            ValueError, match=r"evaluate cannot be sent to .* \(.*\): make it a function"
        ),
    ):
        run(tmp_path, locked, workers=executor)
    check(run(tmp_path, locked))  # the file is free


@pytest.mark.parametrize("name", ["timeout_s", "time_limit_s"])
def test_limits_that_are_no_time(tmp_path, name) -> None:
    with pytest.raises(ValueError, match=f"{name} 0: expected seconds, more than 0, or None"):
        run(tmp_path, **{name: 0})
    assert not list(tmp_path.iterdir())


def test_the_threads_of_a_search_end_with_it(tmp_path) -> None:
    before = set(threading.enumerate())
    run(tmp_path, workers=4)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def leaves(bits) -> float:
    """End the process, as scripts do, for some bits."""
    return sys.exit("no such option") if bits[:2] == (0, 0) else ones(bits)


def test_an_evaluator_that_exits_is_a_failure(tmp_path) -> None:
    result = run(tmp_path, leaves, workers=2, max_failures=60, algorithm="random")
    check(result)
    assert set(result.reader.failures_by_kind()) == {"exception"}


def test_an_evaluator_that_cannot_be_imported_is_no_dead_worker() -> None:
    parcel = sending.in_each_job(b"cno_such_module\nevaluate\n.")
    outcome = workers._run_pickled(parcel, workers.pickled_job(nas.Job(1, 0, (), 0)))
    assert outcome.kind == "exception" and "No module named 'no_such_module'" in outcome.error


def test_a_process_pool_that_breaks_says_what_to_do(tmp_path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        check(run(tmp_path, workers=executor, cycles=20), 20)
        with pytest.raises(
            nas_errors.WorkersError, match=r"take no more jobs .*: use workers='proc"
        ):
            run(tmp_path / "dies", dies, workers=executor)


def dies(bits) -> float:
    os._exit(1)


def fails_sometimes(bits) -> float:
    """Fail for some bits, by an exception, NaN or lack of memory; otherwise count the ones."""
    if bits[:3] == (0, 0, 0):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    if bits[:3] == (0, 0, 1):
        return math.nan
    if bits[:3] == (0, 1, 0):
        raise KeyError("of the evaluator")
    return ones(bits)


def test_failures_of_evaluations_are_outcomes(tmp_path) -> None:
    result = run(tmp_path, fails_sometimes, workers=3, max_failures=60, algorithm="random")
    check(result)
    kinds = result.reader.failures_by_kind()
    assert set(kinds) == {"exception", "nan", "out_of_memory"}
    assert kinds["exception"] % 2 == 0  # each is tried twice
    errors = {row.outcome: row.error for row in result.reader.evaluations()}
    assert errors["exception"] == "KeyError: 'of the evaluator'"
    assert errors["nan"] == "the fitness is nan"


def test_a_hung_thread_is_given_up_and_its_late_report_logged(tmp_path) -> None:
    given_up, seen = threading.Event(), []

    def hangs(bits) -> float:
        seen.append(bits)
        if len(seen) == 5:
            given_up.wait(20)
            return 99.0
        return ones(bits)

    def after_each(search) -> None:
        if search.store.failures_by_kind():
            given_up.set()
            time.sleep(0.1)  # for the thread to end

    result = run(tmp_path, hangs, workers=2, timeout_s=0.5, callback=after_each)
    check(result)
    assert result.reader.failures_by_kind() == {"timeout": 1}
    assert result.best.fitness <= 12
    assert [event.kind for event in result.reader.events()].count("late") == 1


class Compiles(nas.Evaluator):
    """Take longer for the first job."""

    compile_grace_s = 20.0

    def __init__(self, first_s: float) -> None:
        self.left_s = first_s

    def evaluate(self, job: nas.Job) -> float:
        left_s, self.left_s = self.left_s, 0.0
        time.sleep(left_s)
        return ones(job.architecture)


def test_compilation_does_not_count_as_time_of_a_job(tmp_path) -> None:
    result = run(tmp_path, nas.Repeated(Compiles(0.8), 1), timeout_s=0.2)
    check(result)
    assert result.counts.failures == 0 and nas.TrainingEvaluator.compile_grace_s == 1800


def test_compilation_has_a_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Compiles, "compile_grace_s", 0.1)
    result = run(tmp_path, Compiles(1.0), timeout_s=0.2)
    assert result.reader.failures_by_kind() == {"timeout": 1}
    (error,) = result.evaluations["error"].dropna()
    assert error == "took more than timeout_s 0.2, and 0.1 s to compile"


def test_an_evaluator_that_always_fails_ends_the_search(tmp_path) -> None:
    def broken(bits) -> float:
        raise ImportError("no module named torch")

    with pytest.raises(nas.FailuresError, match=r"5 evaluations .* ImportError: no module named t"):
        run(tmp_path, broken, workers=2, max_failures=5)
    result = nas.load("search", tmp_path).resume(evaluate=ones)
    assert result.counts.results == 60 and result.counts.failures >= 5


def test_a_wrong_return_ends_the_search_at_once(tmp_path) -> None:
    with pytest.raises(ReturnError, match=r"returned '\d+' \(str\) as fitness of candidate 0: exp"):
        run(tmp_path, lambda bits: str(sum(bits)))
    check(nas.load("search", tmp_path).resume(evaluate=ones))


def test_jobs_are_reported_and_others_measured_while_a_limit_is_measured(
    tmp_path, monkeypatch
) -> None:
    def measure(bits) -> float:
        with lock:
            measuring.append(bits)
            count = len(measuring)
        if count <= 3:
            together.wait(20)  # three at once
        if count == 4:
            reported.wait(20)  # until two others are reported
        return 1.0

    def after_each(search) -> None:
        if search.evolution.results >= 2:
            reported.set()

    monkeypatch.setattr(asking, "MAX_AT_ONCE", 3)
    lock, measuring = threading.Lock(), []
    together, reported = threading.Barrier(3), threading.Event()
    options = {"workers": 3, "limits": [nas.Limit("size", measure)], "callback": after_each}
    result = run(tmp_path, cycles=12, **options)
    check(result, 12)
    assert reported.is_set() and result.counts.evaluations == 12


def test_an_old_answer_does_not_end_the_search(tmp_path, monkeypatch) -> None:
    """Let a question find no job just before a failure makes one, and answer after it."""

    def slow_ask(search, until) -> nas.Job | None:
        job = ask(search, until)
        if job is None and not asked.is_set():
            asked.set()
            assert reported.wait(20)
        return job

    def report_failure(search, job, outcome) -> None:
        report(search, job, outcome)
        if outcome.kind != "ok":
            reported.set()

    def evaluate(bits) -> float:
        seen.append(bits)
        if len(seen) == 12:
            assert asked.wait(20)
            raise ValueError("once")
        return ones(bits)

    seen, asked, reported = [], threading.Event(), threading.Event()
    ask, report = nas.Search.ask, nas.Search.report
    monkeypatch.setattr(asking, "MAX_AT_ONCE", 1)
    monkeypatch.setattr(nas.Search, "ask", slow_ask)
    monkeypatch.setattr(nas.Search, "report", report_failure)
    limits = [nas.Limit("size", len)]
    check(run(tmp_path, evaluate, workers=2, cycles=12, limits=limits), 12)


def test_no_more_limits_are_measured_at_once_than_there_are_cores(tmp_path, monkeypatch) -> None:
    def measure(bits) -> float:
        with lock:
            measuring.append(bits)
            at_once.append(len(measuring))
        time.sleep(0.005)
        with lock:
            measuring.pop()
        return 1.0

    monkeypatch.setattr(asking, "MAX_AT_ONCE", 2)
    lock, measuring, at_once = threading.Lock(), [], []
    check(run(tmp_path, workers=8, limits=[nas.Limit("size", measure)]))
    assert max(at_once) == 2


def test_an_error_of_the_search_while_a_limit_is_measured(tmp_path) -> None:
    def broken(bits) -> float:
        raise OSError("no compiler")

    limits = [nas.Limit("size", broken)]
    with pytest.raises(nas.FailuresError, match=r"limit 'size': OSError: no compiler"):
        run(tmp_path, workers=3, limits=limits)
    assert run(tmp_path, workers=3, limits=[nas.Limit("size", ones)]).counts.results == 60


def test_a_search_ends_while_a_limit_is_measured(tmp_path) -> None:
    def measure(bits) -> float:
        begun.set()
        end.wait(20)
        return 1.0

    begun, end = threading.Event(), threading.Event()
    limits, started = [nas.Limit("size", measure)], time.monotonic()
    result = run(tmp_path, workers=2, limits=limits, time_limit_s=0.5)
    assert begun.is_set() and time.monotonic() - started < 10 and result.counts.results == 0
    end.set()
    check(run(tmp_path, workers=2, limits=[nas.Limit("size", ones)]))


def test_a_search_resumes_with_its_own_limits_only(tmp_path) -> None:
    """Refuse other limits, whose measures would be mixed in one column."""

    def limited(*bounds: float) -> nas.Result:
        limits = [nas.Limit("ones", sum, bound) for bound in bounds]
        return run(tmp_path, evaluate=unpicklable, limits=limits, cycles=20)

    def unpicklable(bits) -> float:
        return ones(bits) + 0 * lock.locked()

    lock = threading.Lock()
    limited(7)
    assert limited(7).counts.results == 20
    with pytest.raises(
        MismatchError, match=r"other limits: .*at_most 7 in the run, .*at_most 9 here"
    ):
        limited(9)
    other = {"evaluate": ones, "other_evaluator": True, "cycles": 30}
    for again in (limited, lambda: run(tmp_path, **other)):
        with pytest.raises(
            MismatchError, match="at_most 7 in the run, none here; use another name"
        ):
            again()
    kept = [nas.Limit("ones", sum, 7)]
    assert run(tmp_path, **other, limits=kept).counts.results == 30
    small, large = (nas.NetworkCosts(filters=filters).params_m for filters in (4, 8))
    assert nas.Limit("params_m", small).identity != nas.Limit("params_m", large).identity


def test_in_the_background(tmp_path) -> None:
    go = threading.Event()

    def waits(bits) -> float:
        go.wait(20)
        return ones(bits)

    result = run(tmp_path, waits, wait=False, workers=2)
    assert result.is_running and result.counts.results == 0
    with pytest.raises(LookupError, match="has no result yet: wait for the first evaluation"):
        result.best  # noqa: B018
    with pytest.raises(RuntimeError, match="in use by another driver"):
        result.resume(evaluate=ones)
    go.set()
    assert result.wait().counts.results == 60 and not result.is_running
    check(result)


def test_an_error_in_the_background_is_raised_by_wait(tmp_path) -> None:
    result = run(tmp_path, lambda bits: "no number", wait=False)
    with pytest.raises(ReturnError, match="returned 'no number'"):
        result.wait()


def test_stopped_by_callback_time_or_user_and_resumed(tmp_path) -> None:
    def slow(bits) -> float:
        time.sleep(0.01)
        return ones(bits)

    result = run(tmp_path, slow, callback=lambda search: search.evolution.results >= 10)
    assert result.counts.results == 10
    result = run(tmp_path, slow, time_limit_s=0.1)
    assert 10 < result.counts.results < 60
    result = run(tmp_path, slow, wait=False).stop()
    assert result.counts.results < 60
    check(run(tmp_path, slow))


def test_history_and_ranking(tmp_path) -> None:
    result = run(tmp_path, lambda bits: {"fitness": ones(bits), "zeros": 12 - ones(bits)})
    history = result.history
    assert list(history.index) == list(range(60))
    assert set(history["mutation_kind"].dropna()) == {"flip"}
    assert (history["fitness"] + history["zeros"] == 12).all()
    assert result.best.fitness == history["fitness"].max()
    top = result.top(5)
    assert [c.fitness for c in top] == sorted((c.fitness for c in top), reverse=True)
    assert len({Bits().canonical(c.architecture) for c in top}) == 5
    assert result.best.lineage[-1] == result.best and result.best.lineage[0].row.parent is None
    assert result.candidate(3).number == 3
    assert repr(result).startswith("nas.Result('search': 60 results, 60 evaluations, best fitn")


def test_a_repeated_evaluator_averages(tmp_path) -> None:
    class Noisy:
        def evaluate(self, job: nas.Job) -> dict:
            return {"fitness": ones(job.architecture) + job.seed % 2, "one": 1.0}

    result = run(tmp_path, nas.Repeated(Noisy(), 4), cycles=10)
    for candidate in result.population:
        assert candidate.fitness == ones(candidate.architecture) + 0.5
        assert candidate.metrics == {"one": 1.0, "fitness_std": 0.5}
    with pytest.raises(ValueError, match="`repeats` must be a whole number of at least 1, got 0"):
        nas.Repeated(Noisy(), 0)


# --- another process, another day ----------------------------------------------------------------

LATER = """
import nas
result = nas.load("first", {folder!r})
result.resume(cycles=90)
print(result.counts.results, result.best.fitness, len(result.population))
"""
NOTEBOOK = """
import sys; sys.path.insert(0, {tests!r})
import nas
from searches import Bits

class Mine(Bits):
    name = "mine"

def evaluate(bits):
    return float(sum(bits))

nas.search(space=Mine(), evaluate=evaluate, population=8, sample=3, cycles=60, name="first",
           folder={folder!r}, limits=[nas.Limit("ones", evaluate, 11)])
"""


def test_resumed_in_another_process_without_its_functions(tmp_path) -> None:
    """Resume as after a restart of a notebook's kernel, which has lost functions and classes."""
    tests = os.pathsep.join(map(str, HELPERS))
    environment = {**os.environ, "PYTHONPATH": tests}
    for code in (NOTEBOOK, LATER):
        text = code.format(folder=str(tmp_path), tests=tests)
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    results, best, members = done.stdout.split()
    assert (results, members) == ("90", "8") and 9 <= float(best) <= 11


def test_functions_that_cannot_be_stored(tmp_path) -> None:
    lock = threading.Lock()
    run(tmp_path, lambda bits: ones(bits) if lock else 0.0)
    with pytest.raises(
        ValueError, match=r"does not have `evaluate` of the search .*: give it again"
    ):
        nas.load("search", tmp_path).resume(cycles=70)
    same = {**SMALL, "cycles": 70}
    with pytest.raises(MismatchError, match="the code of evaluate has changed"):
        nas.search(evaluate=ones, folder=tmp_path, **same)
    result = nas.search(evaluate=ones, folder=tmp_path, other_evaluator=True, **same)
    assert result.counts.results == 70


def test_another_evaluator_is_refused_unless_allowed(tmp_path) -> None:
    def twos(bits) -> float:
        return 2 * ones(bits)

    run(tmp_path)
    with pytest.raises(
        MismatchError, match=r"evaluate.function is 'ones' in the run, 'twos' here; e"
    ):
        run(tmp_path, twos, cycles=61)
    table = nas.TabularEvaluator(lambda bits: {"valid12": ones(bits), "test200": ones(bits)})
    with pytest.raises(MismatchError, match=r"evaluate.kind is 'Function' in the run, 'Tabular"):
        run(tmp_path, table, cycles=61)
    run(tmp_path, table, cycles=61, other_evaluator=True)
    with pytest.raises(
        MismatchError, match=r"evaluate.fitness is 'valid12' in the run, 'test200' here"
    ):
        run(tmp_path, nas.TabularEvaluator(table.table, "test200"), cycles=62)
    nas.load("search", tmp_path).resume(evaluate=twos, cycles=62)
    assert run(tmp_path, twos, cycles=63).counts.results == 63


def test_a_store_without_an_evaluator_resumes_with_any(tmp_path) -> None:
    with nas.Search(folder=tmp_path, **{**SMALL, "cycles": 8}) as search:
        while job := search.ask():
            search.tell(job, 1.0)
    assert nas.load("search", tmp_path).study.evaluator is None
    check(run(tmp_path))
    assert nas.load("search", tmp_path).study.evaluator == {
        "kind": "Function", "function": "ones", "module": "searches",
    }  # fmt: skip


def test_what_cannot_be_resumed(tmp_path) -> None:
    result = run(tmp_path)
    with pytest.raises(ValueError, match=r"population 9: the run has 8; a search cannot be re"):
        result.resume(population=9)
    with pytest.raises(
        FileNotFoundError,
        match=r"no run 'serach': .*search.sqlite does not exist; the folder .* has: search",
    ):
        nas.load("serach", tmp_path)
    assert nas.load(tmp_path / "search").counts.results == 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "`workers` must be a whole number of at least 1, got 0"),
        ("threads", "workers 'threads': expected a number of threads, 'devices'"),
        ("processes:none", "workers 'processes:none': expected 'processes' or"),
    ],
)
def test_bad_workers(tmp_path, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, workers=given)
    check(run(tmp_path))  # the store was closed


def test_an_evaluator_that_is_none(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"evaluate 0\.9: expected a function of an architecture"):
        run(tmp_path, 0.9)


class Gone:
    """Be a finished future whose worker is lost: a cluster waits for another to repeat the job."""

    def __init__(self, add_done_callback) -> None:
        self.add_done_callback, self.cancelled = add_done_callback, threading.Event()

    def done(self) -> bool:
        return True

    def cancel(self) -> None:
        self.cancelled.set()

    def result(self, timeout: float | None = None) -> None:
        assert not self.cancelled.wait(timeout or 30), "cancelled while it waits"
        raise TimeoutError


def test_a_result_that_does_not_arrive_is_a_dead_worker(tmp_path, monkeypatch) -> None:
    def submit(task, job):
        future = pool.submit(task, job)
        if job.candidate in (5, 20) and job.attempt == 1:
            future.result()
            future = Gone(future.add_done_callback)
            gone.append(future)
        return future

    monkeypatch.setattr(workers, "RESULT_S", 0.05)
    pool, gone = pools.make_pool(2), []
    broken = dataclasses.replace(pool, submit=submit)
    started = time.monotonic()
    result = run(tmp_path, workers=broken)
    check(result)
    assert time.monotonic() - started < 10 and all(future.cancelled.is_set() for future in gone)
    assert result.reader.failures_by_kind() == {"worker_death": 2}
    errors = {row.error for row in result.reader.evaluations("outcome = 'worker_death'")}
    assert errors == {"it was done, but its result did not come within 0.05 s"}


def test_lost_slots_get_no_jobs(tmp_path) -> None:
    def evaluate(bits) -> float:
        with lock:
            busy.append(bits)
            at_once.append(len(busy))
        time.sleep(0.002)
        with lock:
            busy.pop()
        return ones(bits)

    lock, busy, at_once = threading.Lock(), [], []
    pool = dataclasses.replace(
        pools.make_pool(4), count_slots=lambda: 1 if len(at_once) >= 20 else 4
    )
    check(run(tmp_path, evaluate, workers=pool))
    assert max(at_once) > 1 and set(at_once[25:]) == {1}


def test_workers_that_are_gone_end_the_search_in_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(driver, "BEGIN_S", 0.2)
    pool = pools.make_pool(2)
    gone = dataclasses.replace(pool, count_slots=lambda: 0, name="the dask scheduler tcp://h:1")
    with pytest.raises(
        nas_errors.WorkersError, match=r"tcp://h:1 has had no workers for 0.2 s: start some, then r"
    ):
        run(tmp_path, workers=gone)
    assert run(tmp_path).counts.results == 60


def test_workers_that_are_gone_while_jobs_run(tmp_path, monkeypatch) -> None:
    """End the search although the jobs' futures never end; the next driver repeats the jobs."""
    monkeypatch.setattr(driver, "BEGIN_S", 0.2)
    pool, left = pools.make_pool(2), []

    def submit(task, job):
        left.append(job.candidate)
        return pool.submit(task, job) if len(left) < 10 else Future()

    going = dataclasses.replace(
        pool, submit=submit, count_slots=lambda: 2 if len(left) < 11 else 0, name="the cluster"
    )
    with pytest.raises(nas_errors.WorkersError, match=r"the cluster has had no workers for 0.2 s"):
        run(tmp_path, workers=going)
    result = run(tmp_path)
    check(result)
    assert [row.outcome for row in result.reader.evaluations()].count("lost") == 2


def test_workers_that_come_back_or_join_are_used(tmp_path, monkeypatch) -> None:
    def evaluate(bits) -> float:
        with lock:
            busy.append(bits)
            at_once.append(len(busy))
        time.sleep(0.005)
        with lock:
            busy.pop()
        return ones(bits)

    monkeypatch.setattr(driver, "POLL_S", 0.01)
    lock, busy, at_once, slots = threading.Lock(), [], [], iter([0] * 3 + [1] * 30)
    pool = dataclasses.replace(pools.make_pool(4), count_slots=lambda: next(slots, 4))
    check(run(tmp_path, evaluate, workers=pool))
    assert at_once[0] == 1 and max(at_once) == 4


def test_a_run_by_an_executor_is_not_resumed_by_other_workers_silently(tmp_path) -> None:
    def evaluate(bits) -> float:
        names.add(threading.current_thread().name)
        return ones(bits)

    names: set[str] = set()
    with ThreadPoolExecutor(3, "mine") as executor:
        result = run(tmp_path, workers=executor)
        with pytest.raises(ValueError, match=r"workers: .* give it again, or other workers, as"):
            result.resume(evaluate=evaluate, cycles=70)
        assert result.resume(evaluate=evaluate, cycles=70, workers=executor).counts.results == 70
    assert all(name.startswith("mine") for name in names)
    assert run(tmp_path, evaluate, cycles=80, workers=2).counts.results == 80
    assert nas.load("search", tmp_path).resume(cycles=90).counts.results == 90


# --- processes -----------------------------------------------------------------------------------


def test_an_address_that_does_not_answer(tmp_path, monkeypatch) -> None:
    pytest.importorskip("distributed", reason="needs dask: pip install 'gpipe-jax[search]'")
    monkeypatch.setattr(dask, "ANSWER_S", 0.3)
    with pytest.raises(
        nas_errors.WorkersError, match=r"'tcp://127.0.0.1:9': no dask scheduler answ"
    ):
        run(tmp_path, workers="tcp://127.0.0.1:9")


class Perilous:
    """Kill the worker, hang, or work, depending on the job."""

    def __init__(self, hangs: int | None = None) -> None:
        self.hangs = hangs

    def evaluate(self, job: nas.Job) -> float:
        if job.attempt == 1 and job.candidate in (4, 11, 12):
            os._exit(1)
        if job.candidate == self.hangs:
            time.sleep(60)
        return ones(job.architecture)


def test_processes_that_die(tmp_path) -> None:
    """Restart them by nannies, and retry their jobs."""
    pytest.importorskip("distributed", reason="needs dask: pip install 'gpipe-jax[search]'")
    result = run(tmp_path, Perilous(), workers="processes:2", cycles=30)
    check(result, 30)
    kinds = result.reader.failures_by_kind()
    # A job that waits for the worker that another one ends is lost with it.
    assert set(kinds) == {"worker_death"} and kinds["worker_death"] >= 3
    assert result.counts.failed == 0
    assert all(name.startswith("worker ") for name in result.evaluations["worker"].dropna())


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_its_worker(tmp_path) -> None:
    pytest.importorskip("distributed", reason="needs dask: pip install 'gpipe-jax[search]'")
    result = run(tmp_path, Perilous(20), workers="processes:2", cycles=30, timeout_s=4)
    check(result, 30)
    assert result.reader.failures_by_kind()["timeout"] == 1
    assert [row.id for row in result.reader.candidates("state = 'failed'")] == [20]
