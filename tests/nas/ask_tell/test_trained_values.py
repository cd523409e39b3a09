"""Keep files of trained weights while a training may start from them, and remove them then."""

import math
from pathlib import Path
from random import Random

import pytest

import nas
from gpipe_jax.utils import atomic_files
from nas.ask_tell import trained_values


class Numbers:
    """Search numbers, of which groups of four are duplicates."""

    name = "numbers"

    def random(self, rng):
        return rng.randrange(1000)

    def mutate(self, number, rng):
        return number + rng.choice((-1, 1)), "step: by one"

    def canonical(self, number):
        return str(number // 4)

    encode = staticmethod(str)
    decode = staticmethod(int)


def test_drafts_of_weights_are_recognized(tmp_path) -> None:
    path = tmp_path / "3-17.safetensors"
    with atomic_files.replacing(path) as draft:
        draft.touch()
        match = trained_values._NAME.fullmatch(draft.name)
        assert draft.name != path.name and match is not None and match[1] == "17"


def begin(folder: Path) -> nas.Search:
    kept = {"fitness_policy": "retrain_warm", "cache": 1}
    return nas.Search(
        space=Numbers(), folder=folder, population=3, sample=3, cycles=80, max_failures=100, **kept
    )


def origin(search: nas.Search, job: nas.Job) -> int | None:
    """Return the candidate whose weights a job starts from."""
    return (
        job.candidate
        if job.tournament is not None
        else search.store.candidate(job.candidate).parent
    )


@pytest.mark.parametrize("seed", range(8))
def test_files_exist_while_they_are_needed(tmp_path, seed) -> None:
    """Run eight jobs at once that end in any order and often fail, under drivers that end too.

    Only the weights of a duplicate may be removed before its own candidate leaves.
    """
    run, rng, search, running = tmp_path / "search", Random(seed), begin(tmp_path), []
    (run / trained_values.FOLDER).mkdir()
    inherited = 0
    while not search.is_over:
        while len(running) < 8 and (job := search.ask()) is not None:
            whose = origin(search, job)
            if whose is not None and search.store.candidate(whose).answered_by is None:
                inherited += 1
                assert job.inherit is not None and (run / job.inherit).exists()
            (run / trained_values.file_name(job)).touch()  # as if it were being written
            running.append(job)
        job = running.pop(rng.randrange(len(running)))
        assert (run / trained_values.file_name(job)).exists()
        fitness = rng.random() if rng.random() < 0.7 else math.nan
        search.tell(job, {"fitness": fitness, "trained_values": trained_values.file_name(job)})
        if rng.random() < 0.1:
            search.close()
            search, running = begin(tmp_path), []
    assert inherited > 12
    assert len(list((run / trained_values.FOLDER).iterdir())) <= 3 + 8
    search.close()


def test_only_names_of_the_pattern_are_removed(tmp_path) -> None:
    folder = tmp_path / trained_values.FOLDER
    folder.mkdir()
    names = ["1-1.safetensors", "1-2.safetensors", "1-3.safetensors.7.tmp", "1-4.safetensors.7.tmp"]
    for name in (*names, "best.safetensors", "1-1.txt"):
        (folder / name).touch()
    trained_values.remove_except(tmp_path, {"weights/1-1.safetensors", None}, {4})
    left = {path.name for path in folder.iterdir()}
    assert left == {names[0], names[3], "best.safetensors", "1-1.txt"}


def test_which_weights_count_as_removed(tmp_path) -> None:
    assert trained_values.is_removed(tmp_path, "weights/3-4.safetensors")
    assert not trained_values.is_removed(tmp_path, "s3://mine/3-4.safetensors")
    assert not trained_values.is_removed(tmp_path, "weights/mine")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "3-4.safetensors").touch()
    assert not trained_values.is_removed(tmp_path, "weights/3-4.safetensors")


def test_a_waiting_duplicate_finds_its_parents_weights_after_the_parent_left(tmp_path) -> None:
    class Prescribed(Numbers):
        def mutate(self, number, rng):
            return next(children), "step: as told"

    children = iter([8, 9, 500])  # of which two are duplicates
    search = nas.Search(
        space=Prescribed(), folder=tmp_path, population=1, sample=1, cycles=4, cache=1,
        fitness_policy="retrain_warm", max_failures=1,
    )  # fmt: skip
    (tmp_path / "search" / trained_values.FOLDER).mkdir()

    def tell(job: nas.Job, fitness: float = 1.0) -> None:
        (tmp_path / "search" / trained_values.file_name(job)).touch()
        search.tell(job, {"fitness": fitness, "trained_values": trained_values.file_name(job)})

    def ask() -> nas.Job:
        job = search.ask()
        assert job is not None
        return job

    tell(ask())
    for retraining in [ask(), ask(), ask()]:
        tell(retraining)
    first, other = ask(), ask()
    assert (first.candidate, other.candidate) == (1, 3) and search.ask() is None
    tell(other)
    assert [row.id for row in search.store.population()] == [3]
    with pytest.raises(nas.FailuresError):
        tell(first, math.nan)  # as it ends the search, its duplicate is not given up
    waited = ask()
    assert waited.candidate == 2 and waited.inherit is not None
    assert waited.inherit == "weights/0-3.safetensors"  # of the retraining it was proposed after
    search.close()


def test_weights_to_start_from_outlive_the_driver(tmp_path) -> None:
    """Start a child and retrainings from the weights at their proposal, whatever came later."""

    def begin() -> nas.Search:
        return nas.Search(
            space=Numbers(), folder=tmp_path, population=1, sample=1, cycles=4, cache=False,
            fitness_policy="retrain_warm",
        )  # fmt: skip

    def ask() -> nas.Job:
        job = search.ask()
        assert job is not None
        return job

    def tell(job: nas.Job) -> None:
        (run / trained_values.file_name(job)).touch()
        search.tell(job, {"fitness": 1.0, "trained_values": trained_values.file_name(job)})

    def starts(jobs: list[nas.Job]) -> list[tuple]:
        return [(job.candidate, job.tournament, job.inherit) for job in jobs]

    run = tmp_path / "search"
    (run / trained_values.FOLDER).mkdir(parents=True)
    with begin() as search:
        tell(ask())
        first, second, third = ask(), ask(), ask()  # of the only member, for three children
        tell(first)
        child = ask()
        tell(second)  # its parent is trained once more
        before = starts([child, ask(), third])
    expected = [(1, None, 2), (2, None, 3), (0, 3, 1)]
    assert before == [(a, b, f"weights/0-{n}.safetensors") for a, b, n in expected]
    with begin() as search:
        jobs = [ask(), ask(), ask()]
        assert starts(jobs) == before
        assert all(job.inherit and (run / job.inherit).exists() for job in jobs)
        nas.replay(search.store, Numbers())
