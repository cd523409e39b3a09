"""Ask again for jobs that were never told, and refuse the jobs of other searches."""

import threading
import time
from dataclasses import replace

import pytest
from searches import Bits, drive, ones, small

import nas
from nas.ask_tell import leases
from nas.errors import MismatchError


class Clock:
    """Stand in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    return clock


def test_a_lost_job_is_asked_again_after_its_lease(tmp_path, clock) -> None:
    with small(tmp_path, lease_s=60) as search:
        lost = search.ask()
        drive(search)
        assert not search.is_over and search.ask() is None and search.store.counts().results == 59
        clock.now = 59.9
        assert search.ask() is None
        clock.now = 60.1
        again = search.ask()
        assert (again.candidate, again.attempt, again.seed) == (lost.candidate, 2, lost.seed)
        assert search.ask() is None  # its own lease has begun
        search.tell(again, 3.0)
        assert search.is_over
        search.tell(lost, 9.0)  # late, and not fatal
        assert search.store.candidate(lost.candidate).fitness == 3.0
        assert search.store.counts().running == 0
        nas.replay(search.store, Bits())


def test_whoever_tells_first_counts(tmp_path, clock) -> None:
    with small(tmp_path, lease_s=60) as search:
        slow = search.ask()
        drive(search)
        clock.now = 61
        again = search.ask()
        search.tell(slow, 9.0)  # after its lease, but its training is done
        assert search.store.candidate(slow.candidate).fitness == 9.0 and search.is_over
        search.tell(again, 3.0)
        assert search.store.candidate(slow.candidate).fitness == 9.0
        assert [event.kind for event in search.store.events()].count("late") == 1
        assert search.store.counts().running == 0
        outcomes = [row.outcome for row in search.store.evaluations("candidate = 0")]
        assert outcomes == ["ok", "lost"]


def test_a_failure_after_the_lease_leaves_the_second_job_alone(tmp_path, clock) -> None:
    retries = nas.Retries(exception=0)
    with small(tmp_path, lease_s=60, retries=retries, cache=True) as search:
        slow = search.ask()
        drive(search)
        clock.now = 61
        again = search.ask()
        search.fail(slow, ValueError("no"))
        assert search.store.candidate(slow.candidate).state == "open" and search.ask() is None
        search.tell(again, 3.0)
        drive(search)
        assert search.is_over and search.store.counts().failed == 0
        nas.replay(search.store, Bits())


@pytest.mark.parametrize("policy", ["stored", "retrain_scratch"])
def test_a_job_that_is_lost_and_then_fails_does_not_hang(tmp_path, clock, policy) -> None:
    """Lose a job, and let its repetition fail: the lost one decides nothing."""
    with small(tmp_path, lease_s=60, fitness_policy=policy, cycles=12) as search:
        while policy != "stored" and search.evolution.results < 8:
            search.tell(job := search.ask(), ones(job.architecture))
        lost = search.ask()
        drive(search)
        clock.now = 61
        for attempt in (2, 3):
            again = search.ask()
            assert (again.candidate, again.attempt) == (lost.candidate, attempt)
            search.fail(again, ValueError("no"))
        drive(search)
        assert search.is_over and search.store.counts().running == 0
        search.tell(lost, 9.0)  # given up meanwhile
        assert search.store.candidate(lost.candidate).fitness != 9.0
        nas.replay(search.store, Bits())


@pytest.mark.parametrize(
    "end", [lambda search, job: search.tell(job, 9.0), lambda search, job: search.fail(job, "no")]
)
def test_a_lost_job_may_end_after_its_repetition_failed(tmp_path, clock, end) -> None:
    with small(tmp_path, lease_s=60) as search:
        slow = search.ask()
        drive(search)
        clock.now = 61
        search.fail(search.ask(), ValueError("no"))
        end(search, slow)  # before the repetition is asked once more
        state = search.store.candidate(slow.candidate).state
        search.cycles = 70
        drive(search)
        assert search.is_over and search.store.counts().running == 0
        assert search.store.candidate(slow.candidate).state == state
        nas.replay(search.store, Bits())


def test_a_lost_retraining_is_asked_again(tmp_path, clock) -> None:
    options = {"fitness_policy": "retrain_scratch", "cycles": 12, "lease_s": 60}
    with small(tmp_path, **options) as search:
        while (lost := search.ask()).tournament is None:
            search.tell(lost, ones(lost.architecture))
        drive(search)
        assert not search.is_over
        clock.now = 61
        drive(search)
        assert search.is_over and search.store.counts().running == 0
        nas.replay(search.store, Bits())


def test_there_is_no_lease_while_there_is_other_work(tmp_path, clock) -> None:
    with small(tmp_path, lease_s=60) as search:
        first = search.ask()
        clock.now = 1000
        assert search.ask().candidate != first.candidate


def test_the_driver_needs_no_lease(tmp_path, clock) -> None:
    """Let the pool say which jobs are running, for however long."""

    def evaluate(bits) -> float:
        seen.append(bits)
        if len(seen) == 15:  # runs until the end, while there is no other work
            assert is_last.wait(20)
            time.sleep(0.5)
        elif len(seen) == 20:
            clock.now += 10_000
            is_last.set()
        return ones(bits)

    seen, is_last = [], threading.Event()
    options = {"population": 8, "sample": 3, "cycles": 20, "cache": False, "workers": 3}
    result = nas.search(space=Bits(), evaluate=evaluate, folder=tmp_path, **options)
    assert result.counts.proposed == len(result.evaluations) == 20


def test_a_job_of_another_search_is_refused_with_both_names(tmp_path) -> None:
    with small(tmp_path, name="mine") as mine, small(tmp_path, name="other", seed=1) as other:
        job, foreign = mine.ask(), other.ask()
        message = r"of candidate 0 is of the search 'other', .* this is the search 'mine', .*: tell"
        for tell in (lambda: mine.tell(foreign, 99.0), lambda: mine.fail(foreign, "no")):
            with pytest.raises(MismatchError, match=message):
                tell()
        assert mine.store.candidate(0).fitness is None
        mine.tell(job, 1.0)
        other.tell(replace(foreign, run=""), 2.0)  # as one that was built by hand
        assert mine.store.candidate(0).fitness == 1.0 and other.store.candidate(0).fitness == 2.0


def test_a_job_of_a_run_that_was_begun_anew_is_refused(tmp_path) -> None:
    with small(tmp_path, name="run") as search:
        old = search.ask()
    (tmp_path / "run").rename(tmp_path / "before")
    with small(tmp_path, name="run") as search:
        search.ask()
        with pytest.raises(MismatchError, match=r"is of the search 'run', created .*, but this is"):
            search.tell(old, 99.0)


@pytest.mark.parametrize("lease_s", [0, -1.0, "60", True])
def test_a_lease_that_is_no_time(tmp_path, lease_s) -> None:
    with pytest.raises(ValueError, match=f"lease_s {lease_s!r}: expected seconds, more than 0, or"):
        small(tmp_path, lease_s=lease_s)
