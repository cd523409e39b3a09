"""Files of trained values: there while someone may start from them, gone afterwards."""

from pathlib import Path
from random import Random

import pytest

import nas
from nas import keeping


class Numbers:
    """A space of numbers."""

    name = "numbers"

    def random(self, rng):
        return rng.randrange(1000)

    def mutate(self, number, rng):
        return number + rng.choice((-1, 1)), "step: by one"

    encode = canonical = staticmethod(str)
    decode = staticmethod(int)


def begin(folder: Path) -> nas.Search:
    return nas.Search(
        space=Numbers(), folder=folder, population=5, sample=3, cycles=60, cache=False,
        fitness_policy="retrain_warm",
    )  # fmt: skip


def needed(search: nas.Search) -> set[str]:
    return {row.trained_values for row in search.store.population() if row.trained_values}


@pytest.mark.parametrize("seed", range(4))
def test_files_are_there_while_they_are_needed(tmp_path, seed) -> None:
    """Four jobs at once, ended in any order, and a driver that is gone now and then."""
    run, rng, search, running = tmp_path / "search", Random(seed), begin(tmp_path), []
    (run / keeping.FOLDER).mkdir()
    inherited = 0
    while not search.is_over:
        while len(running) < 4 and (job := search.ask()) is not None:
            if job.inherit is not None:
                inherited += 1
                assert (run / job.inherit).exists()
            (run / keeping.name_of(job)).touch()  # as if it were being written
            running.append(job)
        job = running.pop(rng.randrange(len(running)))
        assert (run / keeping.name_of(job)).exists()
        search.tell(job, {"fitness": rng.random(), "trained_values": keeping.name_of(job)})
        assert all((run / name).exists() for name in needed(search))
        if rng.random() < 0.1:
            search.close()
            search, running = begin(tmp_path), []
    assert inherited > 60
    files = {f"{keeping.FOLDER}/{path.name}" for path in (run / keeping.FOLDER).iterdir()}
    assert len(files - needed(search)) <= 8  # of jobs that were under way, and who waits for them
    search.close()
    search = begin(tmp_path)
    assert needed(search) <= {f"weights/{path.name}" for path in (run / "weights").iterdir()}
    search.close()


def test_only_names_of_the_pattern_are_removed(tmp_path) -> None:
    folder = tmp_path / keeping.FOLDER
    folder.mkdir()
    names = ["1-1.safetensors", "1-2.safetensors", "1-3.safetensors.7.tmp", "1-4.safetensors.7.tmp"]
    for name in (*names, "best.safetensors", "1-1.txt"):
        (folder / name).touch()
    keeping.sweep(tmp_path, {"weights/1-1.safetensors", None}, {4})
    left = {path.name for path in folder.iterdir()}
    assert left == {names[0], names[3], "best.safetensors", "1-1.txt"}


def test_what_counts_as_gone(tmp_path) -> None:
    assert keeping.is_gone(tmp_path, "weights/3-4.safetensors")
    assert not keeping.is_gone(tmp_path, "s3://mine/3-4.safetensors")
    assert not keeping.is_gone(tmp_path, "weights/mine")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "3-4.safetensors").touch()
    assert not keeping.is_gone(tmp_path, "weights/3-4.safetensors")
