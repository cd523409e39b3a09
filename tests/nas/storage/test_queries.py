"""Check the numbers of reports and plots against the store."""

import itertools
import time

import pytest
from searches import drive, ones, small

import nas
from nas.storage import queries
from nas.storage.reader import Reader


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_progress_counts_candidates_and_evaluations(tmp_path, maximise, cache) -> None:
    with drive(small(tmp_path, maximise=maximise, cache=cache), slots=3) as search:
        course, counts = queries.progress(search.store), search.store.counts()
        rows = {row.id: row for row in search.store.candidates()}
    assert course.fitness == [rows[number].fitness for number in course.candidate]
    assert sorted(course.candidate) == sorted(rows) and len(rows) == counts.results
    better = max if maximise else min
    assert course.best == list(itertools.accumulate(course.fitness, better))
    assert course.evaluations[-1] == counts.evaluations == counts.results - counts.cache_hits
    assert (counts.cache_hits > 0) is cache
    answered = [rows[number].answered_by is not None for number in course.candidate]
    assert course.evaluations == list(itertools.accumulate(not hit for hit in answered))


def test_after_retraining_best_is_by_the_newest_fitness(tmp_path) -> None:
    def noisy(job) -> float:
        return ones(job.architecture) + job.seed % 100 / 10

    with drive(small(tmp_path, fitness_policy="retrain_scratch"), noisy) as search:
        course, best = queries.progress(search.store), next(search.store.ranked())
    assert course.best[-1] == best.fitness
    assert len(course.best) == 60
    assert any(b < a for a, b in itertools.pairwise(course.best))  # a lucky fitness got worse


def test_ages_follow_the_order_of_training(tmp_path) -> None:
    with drive(small(tmp_path)) as search:
        members, rows = queries.ages(search.store), search.store.population()
    assert [m.age for m in members] == list(range(8))
    assert [(m.candidate, m.fitness) for m in members] == [(r.id, r.fitness) for r in rows[::-1]]
    assert members[0].candidate == max(rows, key=lambda row: row.last_trained or 0).id


def test_the_clock_leaves_out_pauses(tmp_path) -> None:
    with drive(small(tmp_path, cycles=20)):
        pass
    time.sleep(1.5)
    with drive(small(tmp_path, cycles=30)) as search:
        shown, work_s = queries.timeline(search.store), queries.work_s(search.store)
        events = list(search.store.events())
    assert work_s < events[-1].at - events[0].at - 1.4
    assert shown.drivers[0] == 0.0 and 0 < shown.drivers[1] < work_s
    assert len(shown.bars) == 30 and shown.left_out == 0
    before = [bar for bar in shown.bars if bar.evaluation <= 20]
    assert all(bar.end <= shown.drivers[1] for bar in before)
    assert all(bar.start >= shown.drivers[1] for bar in shown.bars[20:])


def test_bars_last_as_long_as_evaluations(tmp_path) -> None:
    def evaluate(bits) -> float:
        time.sleep(0.02)
        if sum(bits) == 5:
            raise ValueError
        return ones(bits)

    result = nas.search(
        space=small(tmp_path / "other").space, evaluate=evaluate, workers=3, population=8,
        sample=3, cycles=30, folder=tmp_path,
    )  # fmt: skip
    shown = queries.timeline(result.reader)
    rows = list(result.reader.evaluations())
    for bar, row in zip(shown.bars, rows, strict=True):
        assert (bar.evaluation, bar.worker, bar.outcome) == (row.id, row.worker, row.outcome)
        assert bar.end - bar.start == pytest.approx(row.finished - row.started, abs=1e-6)
        assert bar.end - bar.start >= 0.02
    assert {"ok", "exception"} == {bar.outcome for bar in shown.bars}
    for _, bars in itertools.groupby(
        sorted(shown.bars, key=lambda b: b.worker), lambda b: b.worker
    ):
        ordered = sorted(bars, key=lambda bar: bar.start)
        assert all(a.end <= b.start for a, b in itertools.pairwise(ordered))
    recent = queries.timeline(result.reader, recent=7)
    assert [bar.evaluation for bar in recent.bars] == [row.id for row in rows[-7:]]
    assert recent.left_out == len(rows) - 7


def test_jobs_without_a_report_share_rows(tmp_path) -> None:
    with small(tmp_path) as search:
        first, second, third = search.ask(), search.ask(), search.ask()
        search.tell(second, 1.0)
        search.tell(first, 2.0)
        fourth = search.ask()
        bars = queries.timeline(search.store).bars
    assert [bar.outcome for bar in bars] == ["ok", "ok", "running", "running"]
    assert [bar.worker for bar in bars] == ["unknown 1", "unknown 2", "running", "running"]
    assert third and fourth and bars[2].end == bars[3].end  # until now


def test_nothing_beats_the_front(tmp_path) -> None:
    for maximise in (True, False):

        def evaluate(job, maximise=maximise) -> dict:
            fitness, rest = job.seed % 13, job.seed // 13 % 17
            good = fitness if maximise else 13 - fitness
            return {"fitness": fitness, "params_m": rest + 2 * good, "accuracy": 1.0}

        with drive(small(tmp_path / str(maximise), maximise=maximise), evaluate) as search:
            assert queries.front_metrics(search.store) == {"params_m": "min"}
            front = [
                (r.fitness, r.metrics["params_m"])
                for r in queries.pareto_front(search.store, "params_m")
            ]
            points = {(r.fitness, r.metrics["params_m"]) for r in search.store.candidates()}
        sign = 1 if maximise else -1
        beaten = {
            (f, c)
            for f, c in points
            if any(sign * g >= sign * f and d <= c and (g, d) != (f, c) for g, d in points)
        }
        assert set(front) == points - beaten and len(front) == len(set(front)) > 2
        assert front == sorted(front, reverse=maximise)


@pytest.mark.parametrize(
    ("name", "is_cost"),
    [("params_m", True), ("flops", True), ("latency_ms", True), ("time_s", True), ("loss", True),
     ("test_error", True), ("memory_bytes", True), ("valid12", False), ("test200", False),
     ("accuracy", False), ("fitness_std", False), ("closs", False), ("compile_s", False),
     ("train_s", False), ("train_loss", False)],
)  # fmt: skip
def test_costs_are_known_by_name(tmp_path, name, is_cost) -> None:
    with drive(small(tmp_path, cycles=8), lambda _: {"fitness": 1.0, name: 2.0}) as search:
        assert queries.front_metrics(search.store) == ({name: "min"} if is_cost else {})


def test_is_running(tmp_path) -> None:
    with small(tmp_path) as search:
        reader = Reader(tmp_path / "search")
        assert queries.is_running(reader)
        search.ask()
    assert not queries.is_running(reader)
    (tmp_path / "search" / "search.lock").unlink()
    assert not queries.is_running(reader)


def test_a_snapshot_does_not_move(tmp_path) -> None:
    with drive(small(tmp_path, cycles=20)):
        pass
    snapshot, reader = queries.Snapshot(tmp_path / "search"), Reader(tmp_path / "search")
    with drive(small(tmp_path, cycles=30)):
        pass
    assert (snapshot.counts().results, len(queries.progress(snapshot).best)) == (20, 20)
    assert reader.counts().results == 30
