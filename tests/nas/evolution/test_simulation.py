"""Simulate a search on a clock, and compare it with the benchmark's curves, with few seeds."""

import csv
import math
from statistics import fmean, stdev

import pytest
from searches import DATA, HAS_TABLE, NO_TABLE, Bits, ones, small

import nas
from nas.evaluators.evaluator import Job, Outcome
from nas.evolution.evolution import Evolution, Settings
from nas.evolution.simulation import StorelessLoop, simulate


def work(job: Job) -> tuple[Outcome, float]:
    """Take ten seconds; the jobs 3, 13, 23, ... take a hundred."""
    return Outcome("ok", ones(job.architecture)), 100.0 if job.candidate % 10 == 3 else 10.0


def loop(cycles: int, **settings) -> StorelessLoop:
    return StorelessLoop(
        Evolution(Bits(), Settings(**{"population": 8, "sample": 3, **settings})), cycles
    )


def test_one_worker_takes_the_sum_and_many_take_turns() -> None:
    assert simulate(loop(20), work)[-1].at_s == 18 * 10 + 2 * 100
    done = simulate(loop(20), work, slots=2)
    assert [each.job.candidate for each in done][:4] == [0, 1, 2, 4]  # 3 takes long
    assert done[-1].at_s == 210.0 and len(done) == 20
    assert len(simulate(loop(20), work, slots=2, max_jobs=5)) == 5


def test_generations_wait_for_their_slowest() -> None:
    done = simulate(loop(20), work, slots=10, synchronous=True)
    assert done[-1].at_s == 200.0 and [d.at_s for d in done].count(200.0) == 1


def test_a_failed_job_is_repeated() -> None:
    failed = set()

    def sometimes(job: Job) -> tuple[Outcome, float]:
        if job.candidate % 3 == 0 and job.candidate not in failed:
            failed.add(job.candidate)
            return Outcome("worker_death"), 5.0
        return work(job)

    done = simulate(loop(30), sometimes, slots=4)
    results = [each.job.candidate for each in done if each.outcome.fitness is not None]
    assert sorted(results) == list(range(30)) and len(done) == 40


def test_a_search_and_the_bare_loop_propose_the_same(tmp_path) -> None:
    bare = [d.job.architecture for d in simulate(loop(60), work, slots=4)]
    with small(tmp_path) as search:
        assert [d.job.architecture for d in simulate(search, work, slots=4)] == bare


@pytest.mark.skipif(not HAS_TABLE, reason=NO_TABLE)
@pytest.mark.parametrize(("P", "S"), [(0, 0), (100, 25), (20, 5), (10, 3)])
def test_the_curves_of_the_benchmark(P, S) -> None:
    """Compare the mean test accuracy of the best of 150 and 200 cells, within 4 standard errors."""
    with (DATA / "nasbench201" / "reference_curves.csv").open() as file:
        rows = {
            int(row["n_evals"]): (float(row["test200_mean"]), float(row["test200_std"] or 0))
            for row in csv.DictReader(file)
            if row["dataset"] == "cifar10" and (int(row["P"] or 0), int(row["S"] or 0)) == (P, S)
        }
    table = nas.NASBench201Table("cifar10", DATA)
    lookup = {cell: table(cell) for cell in table.rows}
    settings = {"population": P, "sample": S} if P else {"algorithm": "random"}
    accuracies: dict[int, list[float]] = {150: [], 200: []}
    for seed in range(60):
        evolution = Evolution(nas.NASBench201Space(), Settings(seed=seed, **settings))
        done = simulate(
            StorelessLoop(evolution, 200),
            lambda job: (Outcome("ok", lookup[job.architecture]["valid12"]), 1.0),
        )
        for n, values in accuracies.items():
            best = max(done[:n], key=lambda each: each.outcome.fitness)
            values.append(lookup[best.job.architecture]["test200"])
    for n, values in accuracies.items():
        mean, deviation = rows[n]
        error = math.hypot(stdev(values) / math.sqrt(60), deviation / math.sqrt(1000))
        assert abs(fmean(values) - mean) < 4 * error, (n, fmean(values), mean, error)
