"""Remember networks that fail: their duplicates are not trained."""

from collections import Counter

import pytest
from searches import Bits, drive, ones, small

import nas
from nas.ask_tell import limits
from nas.evaluators.evaluator import FAILURES, Outcome


def run(search: nas.Search, bad: str, kind: str = "out_of_memory") -> Counter[str]:
    """Let one network fail; return how often each network was evaluated."""
    seen: Counter[str] = Counter()
    while (job := search.ask()) is not None:
        seen[network := Bits().canonical(job.architecture)] += 1
        if network == bad:
            search.report(job, Outcome(kind, error="no"))
        else:
            search.tell(job, ones(job.architecture))
    return seen


class Few(Bits):
    """Have 8 texts and 4 networks, so that each is proposed often."""

    name, length = "few bits", 3


BAD = "001"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_network_that_fails_is_not_trained_again(tmp_path, kind) -> None:
    with small(tmp_path, space=Few(), cache=True, max_failures=99) as search:
        seen = run(search, BAD, kind)
        assert seen[BAD] == 1 + getattr(nas.Retries(), kind) and set(seen.values()) >= {1}
        counts = search.store.counts()
        assert counts.results == 60 and counts.failed > 5 and counts.running == 0
        assert counts.evaluations + counts.cache_hits == 60
        assert counts.proposed == 60 + counts.failed
        failed = list(search.store.candidates("state = 'failed'"))
        assert [row.answered_by for row in failed] == [None] + [failed[0].id] * (len(failed) - 1)
        nas.replay(search.store, Few())


def test_without_a_cache_a_network_that_fails_is_trained_again(tmp_path) -> None:
    with small(tmp_path, space=Few(), cache=False, max_failures=99) as search:
        assert run(search, BAD)[BAD] > 3


def test_a_failure_counts_as_one_of_several_evaluations(tmp_path) -> None:
    with small(tmp_path, space=Few(), cache=3, max_failures=99) as search:
        seen = run(search, BAD)
        assert seen[BAD] == 3 and len(seen) >= 3 and set(seen.values()) == {3}


def test_failures_are_remembered_on_resume_but_not_if_they_ended_the_search(tmp_path) -> None:
    options = {"space": Few(), "cache": True, "max_failures": 2}
    with small(tmp_path, **options) as search:
        while (job := search.ask()) is not None:
            if Few().canonical(job.architecture) == BAD:
                search.fail(job, MemoryError())
                break
            search.tell(job, ones(job.architecture))
    with small(tmp_path, **options) as search:
        with pytest.raises(nas.FailuresError, match=r"2 evaluations have failed in a row"):
            for _ in range(4):  # a cause outside the networks
                search.fail(search.ask(), MemoryError())
        seen = run(search, "none")
        assert seen[BAD] == 1 and search.store.counts().results == 60
    with small(tmp_path, **{**options, "cycles": 100}) as search:
        assert not run(search, "none")  # all four are known
        nas.replay(search.store, Few())


def test_another_evaluator_forgets_the_failures_of_the_last(tmp_path) -> None:
    options = {"space": Few(), "cache": True, "max_failures": 99}
    with small(tmp_path, **options, evaluator={"data": 1}) as search:
        run(search, BAD)
    with small(tmp_path, **{**options, "cycles": 120}, evaluator={"data": 1}) as search:
        assert BAD not in run(search, BAD)
    options |= {"cycles": 180, "evaluator": {"data": 2}, "other_evaluator": True}
    with small(tmp_path, **options) as search:
        assert run(search, "none")[BAD] == 1


def test_a_space_in_which_everything_failed_ends_the_search(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "MAX_REJECTED", 100)
    message = "rejected 100 candidates in a row, the last as equal to candidate .*, which was given"
    with small(tmp_path, space=Few(), cache=True, max_failures=99) as search:
        with pytest.raises(nas.FailuresError, match=message):
            while job := search.ask():
                search.fail(job, MemoryError())
        assert search.store.counts().failures == 4


def test_a_failed_network_is_remembered_by_the_driver(tmp_path) -> None:
    def evaluate(bits) -> float:
        if sum(bits) == 1:
            seen.append(bits)
            raise MemoryError
        return ones(bits)

    seen: list = []
    options = {"population": 5, "sample": 2, "cycles": 60, "max_failures": 99}
    result = nas.search(space=Few(), evaluate=evaluate, folder=tmp_path, **options)
    assert len(seen) == 1 and result.counts.failed > 3


def test_drive_ends(tmp_path) -> None:
    with small(tmp_path, space=Few(), cache=True) as search:
        assert drive(search, slots=4).store.counts().results == 60
