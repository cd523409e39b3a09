"""Ask and tell: cache, duplicates, limits, failures, retraining, and invalid arguments."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from searches import Bits, drive, ones, population, small, trace

import nas
from nas.ask_tell import limits
from nas.errors import ReturnError
from nas.evaluators.evaluator import FAILURES, Outcome
from nas.storage.writer import Store


def test_the_loop_of_the_readme(tmp_path) -> None:
    search, told = small(tmp_path), 0
    while (job := search.ask()) is not None:
        search.tell(job, {"fitness": ones(job.architecture), "zeros": 12 - ones(job.architecture)})
        told += 1
    counts = search.store.counts()
    assert told == counts.results == counts.evaluations == 60 and len(population(search)) == 8
    best = next(search.store.ranked())
    assert best.fitness >= 9.0 and best.metrics == {"zeros": 12.0 - best.fitness}
    assert search.is_over and search.ask() is None
    search.close()


def test_any_order_of_reports_keeps_the_population_exact(tmp_path) -> None:
    with small(tmp_path, cycles=200) as search:
        drive(search, slots=16)
        assert search.store.counts().results == 200 and len(population(search)) == 8
        assert len(search.evolution.members) == 8
        nas.replay(search.store, Bits())


def test_evolution_waits_for_results_not_for_proposals(tmp_path) -> None:
    with small(tmp_path) as search:
        jobs = [search.ask() for _ in range(20)]
        rows = list(search.store.candidates())
        assert all(jobs) and all(row.parent is None for row in rows)
        for job in jobs[:8]:
            search.tell(job, 1.0)
        search.ask()
        assert search.store.candidate(20).parent is not None


def test_the_two_directions_are_mirror_images(tmp_path) -> None:
    with small(tmp_path / "a") as up, small(tmp_path / "b", maximise=False) as down:
        drive(up), drive(down, lambda job: -ones(job.architecture))
        assert [row[:5] for row in trace(up)] == [row[:5] for row in trace(down)]
        assert up.best_fitness == -down.best_fitness >= 9.0


@pytest.mark.parametrize(("maximise", "target"), [(True, 9.0), (False, 3.0)])
def test_a_target_ends_the_search(tmp_path, maximise, target) -> None:
    with small(tmp_path, maximise=maximise, target=target, cycles=10_000) as search:
        drive(search)
        fitnesses = [row.fitness for row in search.store.candidates()]
        assert fitnesses[-1] == target and fitnesses.count(target) == 1


def test_a_target_is_met_by_a_retraining_too(tmp_path) -> None:
    def evaluate(job: nas.Job) -> float:
        return 1.0 if job.tournament is None else 50.0

    with small(tmp_path, target=50.0, fitness_policy="retrain_scratch") as search:
        drive(search, evaluate)
        assert search.best_fitness == 50.0 and search.store.counts().results == 8


def test_random_search_needs_no_population(tmp_path) -> None:
    with small(tmp_path, algorithm="random", population=100, cycles=5) as search:
        assert drive(search).store.counts().results == 5


def test_asking_and_telling_from_many_threads(tmp_path) -> None:
    def work() -> None:
        while (job := search.ask()) is not None:
            search.tell(job, ones(job.architecture))

    search = small(tmp_path, cycles=400)
    with search, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work) for _ in range(8)]:
            done.result()
        drive(search)
        counts = search.store.counts()
        assert (counts.results, counts.evaluations, counts.proposed) == (400, 400, 400)
        nas.replay(search.store, Bits())


def test_a_report_that_failed_can_be_repeated(tmp_path, monkeypatch) -> None:
    with small(tmp_path) as search:
        job = search.ask()
        with monkeypatch.context() as patch:
            patch.setattr(search.store, "change", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                search.tell(job, 1.0)
        search.tell(job, 3.0)
        assert search.store.candidate(0).fitness == 3.0


def test_a_failed_write_changes_nothing_in_memory(tmp_path, monkeypatch) -> None:
    """Let each write of a search fail once; repeated, everything is as without a failure."""

    def failing(store, table: str, row: int, **columns) -> None:
        nonlocal failures
        key = (table, row, *columns)
        if key not in failed:
            failed.add(key)
            failures += 1
            raise OSError("disk full")
        update(store, table, row, **columns)

    def again(function, *arguments):
        while True:
            try:
                return function(*arguments)
            except OSError:
                members = [member.candidate for member in search.evolution.members]
                assert members == population(search)

    with small(tmp_path / "whole", cache=True) as whole:
        drive(whole)
        expected = trace(whole), population(whole)
    update, failed, failures = Store._update, set(), 0
    monkeypatch.setattr(Store, "_update", failing)
    with small(tmp_path, cache=True) as search:
        while (job := again(search.ask)) is not None:
            again(search.tell, job, ones(job.architecture))
        assert (trace(search), population(search)) == expected and failures > 150
        nas.replay(search.store, Bits())


# --- cache ----------------------------------------------------------------------------------------


def test_duplicates_are_evaluated_once_and_nothing_else_changes(tmp_path) -> None:
    with small(tmp_path / "a") as plain, small(tmp_path / "b", cache=True) as cached:
        drive(plain), drive(cached)
        assert trace(plain) == trace(cached)
        counts = cached.store.counts()
        assert counts.evaluations + counts.cache_hits == 60 and counts.cache_hits > 10
        networks = [Bits().canonical(Bits().decode(row.architecture))
                    for row in cached.store.candidates("answered_by IS NULL")]  # fmt: skip
        assert len(set(networks)) == len(networks)
        for row in cached.store.candidates("answered_by IS NOT NULL"):
            assert row.fitness == cached.store.candidate(row.answered_by).fitness


def test_recency_is_of_arrival_and_without_a_cache_of_training(tmp_path) -> None:
    for cache in (True, False):
        with small(tmp_path / str(cache), cache=cache) as search:
            drive(search)
            kinds = {event.seq: event.kind for event in search.store.events()}
            for row in search.store.candidates():
                answered = row.answered_by is not None
                assert kinds[row.last_trained] == ("answer" if answered else "result")
                assert not (answered and not cache)


def test_a_duplicate_of_a_running_candidate_waits(tmp_path) -> None:
    with small(tmp_path, cache=True, cycles=300) as search:
        running_now: dict[str, int] = {}
        running = []
        while not search.is_over:
            while len(running) < 16 and (job := search.ask()) is not None:
                running.append(job)
                name = Bits().canonical(job.architecture)
                running_now[name] = running_now.get(name, 0) + 1
                assert running_now[name] == 1, "a duplicate is evaluated at the same time, or again"
            job = running.pop()
            search.tell(job, ones(job.architecture))
        assert search.store.counts().cache_hits > 100
        nas.replay(search.store, Bits())


def test_a_duplicate_waits_for_a_retry(tmp_path) -> None:
    class AllEqual(Bits):
        def canonical(self, bits):
            return "all the same"

    with small(tmp_path, space=AllEqual(), cache=True, retries=nas.Retries(exception=1)) as search:
        first = search.ask()
        assert search.ask() is None  # all others wait
        assert search.store.counts().proposed == 60
        search.fail(first, "no")
        second = search.ask()
        assert (second.candidate, second.attempt) == (0, 2)
        search.tell(second, 5.0)
        drive(search)
        counts = search.store.counts()
        assert (counts.evaluations, counts.cache_hits, counts.failed) == (1, 59, 0)


def test_the_mean_answers_after_n_evaluations(tmp_path) -> None:
    with small(tmp_path, cache=3, cycles=400) as search:
        drive(search, lambda job: ones(job.architecture) + (job.seed % 1000) / 1000, slots=4)
        by_network: dict = {}
        for row in search.store.candidates():
            by_network.setdefault(row.canonical, []).append(row)
        often = [rows for rows in by_network.values() if len(rows) > 5]
        assert often
        for rows in often:
            own = [row for row in rows if row.answered_by is None]
            mean = sum(row.fitness for row in own) / 3
            assert len(own) == 3 and len({row.fitness for row in own}) > 1
            assert all(row.fitness == pytest.approx(mean) for row in rows if row not in own)


def test_the_mean_of_a_metric_is_over_evaluations_that_have_it(tmp_path) -> None:
    def evaluate(job: nas.Job) -> dict[str, float]:
        seen[network := Bits().canonical(job.architecture)] += 1
        only = {"early": 4.0} if seen[network] == 1 else {"late": 6.0}
        return {"fitness": ones(job.architecture), "both": seen[network], **only}

    seen: Counter[str] = Counter()
    with small(tmp_path, cache=2, cycles=200) as search:
        drive(search, evaluate)
        answered = list(search.store.candidates("answered_by IS NOT NULL"))
    assert len(answered) > 5
    for row in answered:
        assert row.metrics == {"both": 1.5, "early": 4.0, "late": 6.0}


# --- limits and failures --------------------------------------------------------------------------


def test_limits_reject_before_training(tmp_path) -> None:
    both = [nas.Limit("ones", ones, 7), nas.Limit("first", lambda bits: bits[0], 1)]
    with small(tmp_path, limits=both) as search:
        drive(search)
        counts = search.store.counts()
        assert counts.results == 60 and counts.rejected > 5
        assert counts.proposed == 60 + counts.rejected
        assert max(row.fitness for row in search.store.ranked()) == 7.0
        rejected = next(search.store.candidates("state = 'rejected'"))
        assert rejected.metrics == {"ones": ones(map(int, rejected.architecture))}
        done = next(search.store.candidates("state = 'done'"))
        assert set(done.metrics) == {"ones", "first"}
        nas.replay(search.store, Bits())


def test_limits_that_reject_everything_end_the_search(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_REJECTED", 100)
    search = small(tmp_path, limits=[nas.Limit("ones", ones, -1)])
    with search, pytest.raises(nas.FailuresError, match="rejected 100 candidates in a row, the l"):
        search.ask()


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_retried_as_often_as_set(tmp_path, kind) -> None:
    with small(tmp_path, retries=nas.Retries(**{kind: 2}), max_failures=100) as search:
        job = search.ask()
        for attempt in (1, 2, 3):
            assert (job.candidate, job.attempt) == (0, attempt)
            search.report(job, Outcome(kind, error="no"))
            job = search.ask()
        assert job.candidate == 1
        assert search.store.candidate(0).state == "failed"
        search.tell(job, 1.0)
        drive(search)
        counts = search.store.counts()
        assert (counts.results, counts.failed, counts.failures) == (60, 1, 3)
        assert search.store.failures_by_kind() == {kind: 3}
        nas.replay(search.store, Bits())


def test_the_same_seed_is_used_in_every_attempt(tmp_path) -> None:
    with small(tmp_path) as search:
        job = search.ask()
        search.report(job, Outcome("exception"))
        again = search.ask()
        assert again.seed == job.seed and again.evaluation != job.evaluation
        assert search.ask().seed != job.seed


def test_failures_in_a_row_end_the_search_with_the_last(tmp_path) -> None:
    message = r"4 evaluations have failed in a row \(max_failures\); .*, by exception: no: 4"
    search = small(tmp_path, max_failures=4)
    with search, pytest.raises(nas.FailuresError, match=message):
        for attempt in range(1, 9):
            search.report(search.ask(), Outcome("exception", error=f"no: {attempt}"))
    with small(tmp_path, max_failures=4) as search:  # it resumes once the cause is removed
        for _ in range(3):
            search.report(search.ask(), Outcome("exception"))
        search.tell(search.ask(), 1.0)
        for _ in range(3):
            search.report(search.ask(), Outcome("exception"))
        drive(search)
        assert search.store.counts().results == 60


def test_workers_that_die_all_at_once_do_not_end_the_search(tmp_path) -> None:
    """Count the death of a worker when its job is given up: a cluster takes all jobs with it."""
    with small(tmp_path, max_failures=2) as search:
        for job in [search.ask() for _ in range(6)]:
            search.report(job, Outcome("worker_death", error="the cluster is gone"))
        assert [search.ask().attempt for _ in range(6)] == [2] * 6
    with (
        small(tmp_path, max_failures=2, retries=nas.Retries(worker_death=0)) as search,
        pytest.raises(
            nas.FailuresError, match=r"2 evaluations have failed in a row .*worker_death"
        ),
    ):
        for _ in range(2):
            search.report(search.ask(), Outcome("worker_death", error="again"))


def test_late_and_repeated_reports_change_nothing(tmp_path) -> None:
    with small(tmp_path) as search:
        job, other = search.ask(), search.ask()
        search.tell(job, 3.0)
        search.tell(job, 9.0)
        assert search.store.candidate(0).fitness == 3.0
    with small(tmp_path) as search:  # `other` belongs to the earlier driver
        again = search.ask()
        assert (again.candidate, again.attempt) == (other.candidate, 2)
        search.tell(other, 5.0)
        assert search.store.candidate(1).fitness is None
        search.tell(again, 4.0)
        assert search.store.candidate(1).fitness == 4.0
        assert [event.kind for event in search.store.events()].count("late") == 2
        assert [row.outcome for row in search.store.evaluations()] == ["ok", "lost", "ok"]


# --- retraining -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("policy", ["retrain_scratch", "retrain_warm"])
def test_sampled_members_are_trained_again(tmp_path, policy, slots) -> None:
    """Give them a new fitness, stamp and weights, from which warm ones and children start."""
    jobs = []

    def evaluate(job: nas.Job) -> dict:
        jobs.append(job)
        fitness = ones(job.architecture) + (job.seed % 1000) / 10_000
        return {"fitness": fitness, "trained_values": f"{job.candidate}/{len(jobs)}"}

    with small(tmp_path, fitness_policy=policy, cycles=40) as search:
        drive(search, evaluate, slots)
        store = search.store
        assert store.counts().results == 40 and len(population(search)) == 8
        again = list(store.evaluations("tournament IS NOT NULL"))
        assert len(again) > 32
        stamps: dict[int, list[int]] = {}
        for event in store.events():
            if event.kind in ("result", "retrain"):
                stamps.setdefault(event.candidate, []).append(event.seq)
        for row in store.candidates():
            assert row.last_trained == stamps[row.id][-1]
            evaluations = list(store.evaluations("candidate = ?", row.id))
            assert row.fitness in [evaluation.fitness for evaluation in evaluations]
        retrained = [job for job in jobs if job.tournament is not None]
        children = [job for job in jobs if job.tournament is None and job.candidate >= 8 + slots]
        if policy == "retrain_warm":
            assert all(job.inherit.startswith(f"{job.candidate}/") for job in retrained)
            parents = {row.id: row.parent for row in store.candidates()}
            assert all(job.inherit.startswith(f"{parents[job.candidate]}/") for job in children)
        else:
            assert all(job.inherit is None for job in jobs)
        nas.replay(store, Bits())


def test_the_least_recently_trained_member_is_removed(tmp_path) -> None:
    with small(tmp_path, fitness_policy="retrain_scratch", cycles=40) as search:
        drive(search)
        removed = [(row.removed, row.id) for row in search.store.candidates("removed NOT NULL")]
        assert [number for _, number in sorted(removed)] != sorted(number for _, number in removed)


def test_a_retraining_keeps_only_the_metrics_of_the_limits(tmp_path) -> None:
    def evaluate(job: nas.Job) -> dict:
        of = "first" if job.tournament is None else "again"
        return {"fitness": ones(job.architecture), of: 1.0}

    limit = nas.Limit("zeros", lambda bits: 12 - ones(bits))
    with small(tmp_path, fitness_policy="retrain_scratch", limits=[limit], cycles=20) as search:
        drive(search, evaluate)
        again = {row.candidate for row in search.store.evaluations("tournament IS NOT NULL")}
        assert len(again) > 8
        for row in search.store.candidates():
            of = "again" if row.id in again else "first"
            assert row.metrics == {"zeros": 12 - row.fitness, of: 1.0}


def test_a_failed_retraining_keeps_the_fitness(tmp_path) -> None:
    def evaluate(job: nas.Job) -> float:
        return math.nan if job.tournament is not None else ones(job.architecture)

    with small(tmp_path, fitness_policy="retrain_scratch", cycles=20, max_failures=99) as search:
        drive(search, evaluate)
        assert search.store.counts().results == 20 and search.store.counts().failed == 0
        nas.replay(search.store, Bits())


def test_a_retraining_that_was_given_up_is_not_tried_again_after_a_resume(tmp_path) -> None:
    options = {"fitness_policy": "retrain_scratch", "cycles": 12, "max_failures": 99}
    with small(tmp_path, **options) as search:
        while (job := search.ask()).tournament is None:
            search.tell(job, ones(job.architecture))
        search.tell(job, math.nan)
        assert search.store.kept_members(job.tournament) == [job.candidate]
    with small(tmp_path, **options) as search:
        trained = []
        while (again := search.ask()) is not None:
            trained.append((again.candidate, again.tournament))
            search.tell(again, ones(again.architecture))
        assert (job.candidate, job.tournament) not in trained
        assert job.tournament in {tournament for _, tournament in trained}
        assert search.store.counts().results == 12
        nas.replay(search.store, Bits())


# --- invalid arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("0.9", r"evaluate returned '0.9' \(str\) as fitness of candidate 0: expected one number"),
        (np.ones(2), r"returned array.* \(ndarray of shape \(2,\)\) as fitness of candidate 0"),
        (None, r"returned None \(NoneType\) as fitness"),
        ({"accuracy": 1.0}, "a dict with 'accuracy' for candidate 0, but its fitness is looked up"),
        pytest.param(10**400, r"returned 1000.* \(int\) as fitness", id="too large"),
        (
            {"fitness": 1.0, "trained_values": 3},
            "trained_values 3 for candidate 0: expected a text",
        ),
    ],
)
def test_a_return_that_is_no_fitness(tmp_path, returned, message) -> None:
    with small(tmp_path) as search, pytest.raises(ReturnError, match=message):
        search.tell(search.ask(), returned)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), 1, True, np.bool_(False)])
def test_a_return_that_is_one_number(tmp_path, value) -> None:
    with small(tmp_path) as search:
        search.tell(search.ask(), value)
        assert search.store.candidate(0).fitness == float(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycles": "many"}, "`cycles` must be a whole number of at least 1, got 'many'"),
        ({"maximise": "no"}, "maximise 'no': expected True or False"),
        ({"cycles": 7}, "cycles 7 is less than population 8: evolution begins when"),
        ({"cache": -1}, "cache -1: expected True, False, or how many times"),
        ({"max_failures": 0}, "`max_failures` must be a whole number of at least 1, got 0"),
        ({"population": 0}, "`population` must be a whole number of at least 1, got 0"),
        ({"target": math.nan}, "target nan: expected a number, not NaN, or None"),
        ({"target": "9"}, "target '9': expected a number"),
        ({"target": True}, "target True: expected a number"),
        ({"space": "nasbench"}, "unknown space 'nasbench'; did you mean 'nasbench201'"),
    ],
)
def test_bad_arguments(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_bad_retries() -> None:
    with pytest.raises(ValueError, match=r"`retries\.nan` must be .* of at least 0, got -1"):
        nas.Retries(nan=-1)
