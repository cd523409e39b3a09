"""Store what a resume needs, part by part, and nothing large."""

import sqlite3
import threading

import numpy as np
import pytest
from searches import Bits, ones

import nas
from nas.pickles.setup import MAX_BYTES, Setup, load_setup

OPTIONS = {"space": Bits(), "population": 5, "sample": 2, "cycles": 10}


def with_data(data):
    return lambda bits: ones(bits) + 0.0 * len(data)


@pytest.mark.parametrize("data", [np.zeros(10**6), b"x" * 10**7, [1.5] * 10**6])
def test_the_data_of_an_evaluator_are_not_stored(tmp_path, data) -> None:
    result = nas.search(evaluate=with_data(data), folder=tmp_path, **OPTIONS)
    assert result.reader.file.stat().st_size < MAX_BYTES
    loaded = nas.load("search", tmp_path)
    assert sum(loaded.best.architecture) == loaded.best.fitness  # the space is stored
    message = r"does not have `evaluate` .* more than 1 MB\): give it again, resume\(evaluate="
    with pytest.raises(ValueError, match=message):
        loaded.resume(cycles=11)
    assert loaded.resume(evaluate=with_data(data), cycles=11).counts.results == 11
    assert result.resume(cycles=12).counts.results == 12  # this process has it


def test_the_scheduler_of_somebody_else_is_not_asked(tmp_path, monkeypatch) -> None:
    result = nas.search(evaluate=ones, folder=tmp_path, **OPTIONS)
    setup = Setup(Bits(), ones, (), {"workers": "tcp://10.0.0.1:8786", "cycles": 10})
    with sqlite3.connect(result.reader.file) as connection:
        connection.execute("UPDATE study SET setup = ?", (setup.pickled(),))
    assert load_setup(result.reader).options["workers"] == "tcp://10.0.0.1:8786"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody else's"))
    loaded = nas.load("search", tmp_path, space=Bits())
    with pytest.raises(ValueError, match="workers: the run was driven by an executor"):
        loaded.resume(evaluate=ones, cycles=11)
    assert loaded.resume(evaluate=ones, cycles=11, workers=1).counts.results == 11


def test_what_cannot_be_pickled_does_not_take_the_rest_with_it(tmp_path) -> None:
    lock = threading.Lock()

    def locked(bits) -> float:
        with lock:
            return ones(bits)

    limit = nas.Limit("size", sum, 12)
    nas.search(
        evaluate=locked, folder=tmp_path, limits=[limit], workers=np.int64(2),
        retries=nas.Retries(nan=2), **OPTIONS,
    )  # fmt: skip
    loaded = nas.load("search", tmp_path)
    with pytest.raises(ValueError, match=r"`evaluate` of the search \(it cannot be pickled"):
        loaded.resume(cycles=11)
    assert loaded.resume(evaluate=ones, cycles=11).counts.results == 11
    setup = load_setup(loaded.reader, needed=["space", "limits"])
    assert isinstance(setup.space, Bits) and setup.limits == (limit,)
    assert setup.options["retries"] == nas.Retries(nan=2) and setup.options["workers"] == 2
