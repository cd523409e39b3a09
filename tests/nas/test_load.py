"""Read runs of somebody else without running code of theirs, and with a space of one's own."""

import importlib
import os
import pickle
import sqlite3
import sys

import pytest
from searches import Bits, drive, ones, small

import nas
from gpipe_jax import known_code
from nas.errors import MismatchError
from nas.reports import html

OPTIONS = {"population": 5, "sample": 2, "cycles": 10}


@pytest.fixture(autouse=True)
def own_notes(tmp_path, monkeypatch) -> None:
    """Keep this user's notes about code in a folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def be_somebody_else(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other state"))


class Evil:
    """Make a folder when it is unpickled."""

    folder = ""

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("is_old", [True, False])
def test_no_way_of_reading_runs_code_of_the_run(tmp_path, monkeypatch, is_old) -> None:
    result = nas.search(space=Bits(), evaluate=ones, folder=tmp_path, **OPTIONS)
    Evil.folder = str(tmp_path / "code ran")
    stored = result.reader.setup()
    if is_old:
        stored = pickle.dumps(Evil())
    else:
        evil = nas.pickles.setup.Setup(Evil(), Evil(), (), {})
        stored = evil.pickled()
    with sqlite3.connect(result.reader.file) as connection:
        connection.execute("UPDATE study SET setup = ?", (stored,))
    be_somebody_else(monkeypatch, tmp_path)
    loaded = nas.load("search", tmp_path)
    best = loaded.best
    assert best.fitness == result.best.fitness and len(loaded.history) == 10
    assert repr(best).startswith(f"Candidate(number={best.number}, architecture='")
    assert best.row.architecture in best._repr_html_() and loaded._repr_html_()
    assert html.page(loaded.reader) and best.lineage and best.plot_lineage()
    for reading in (lambda: best.architecture, lambda: loaded.space, loaded.resume):
        with pytest.raises(ValueError, match=r"holds code .* you have not stored .* trust=True"):
            reading()
    with pytest.raises(ValueError, match=r"holds code \(space\) .* give nas.load\(\.\.\., space="):
        loaded.resume(evaluate=ones, cycles=11)
    given = nas.load("search", tmp_path, space=Bits())
    assert sum(given.best.architecture) == best.fitness
    assert given.resume(evaluate=ones, cycles=11, workers=1).counts.results == 11
    assert not (tmp_path / "code ran").exists()


def test_a_run_of_ones_own_needs_no_trust(tmp_path, monkeypatch) -> None:
    nas.search(space=Bits(), evaluate=ones, folder=tmp_path, **OPTIONS)
    assert sum(nas.load("search", tmp_path).best.architecture) >= 5
    assert nas.load("search", tmp_path).resume(cycles=12).counts.results == 12
    be_somebody_else(monkeypatch, tmp_path)
    assert sum(nas.load("search", tmp_path, trust=True).best.architecture) >= 5
    assert nas.load("search", tmp_path, trust=True).resume(cycles=13).counts.results == 13


def test_a_space_whose_module_is_not_here_is_given(tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "from searches import Bits\nclass Own(Bits):\n    name = 'own'\n"
    )
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        space = importlib.import_module("theirs").Own()
        nas.search(space=space, evaluate=ones, folder=tmp_path, **OPTIONS)
    del sys.modules["theirs"]
    result = nas.load("search", tmp_path)
    assert result.best.fitness >= 5
    message = r"does not have `space` .*\(Mod.*: give it again, nas\.load\(\.\.\., space="
    with pytest.raises(ValueError, match=message):
        _ = result.best.architecture
    with pytest.raises(MismatchError, match="of the space 'own', but the given one is 'bits'"):
        nas.load("search", tmp_path, space=Bits())
    assert nas.load("search", tmp_path, space=space).best.architecture


def test_a_space_that_reads_something_else_is_refused(tmp_path) -> None:
    class Reversed(Bits):
        def decode(self, text):
            return super().decode(text)[1:]

    nas.search(space=Bits(), evaluate=ones, folder=tmp_path, **OPTIONS)
    result = nas.load("search", tmp_path, space=Reversed())
    with pytest.raises(ValueError, match=r"'bits' reads .* '\d{12}' of the run, .* as '\d{11}'"):
        _ = result.best.architecture


def test_an_own_space_may_have_the_name_of_a_built_in_one(tmp_path) -> None:
    class Namesake(Bits):
        name = "nasnet"

    result = nas.search(space=Namesake(), evaluate=ones, folder=tmp_path, **OPTIONS)
    assert nas.load("search", tmp_path).best.architecture == result.best.architecture


@pytest.mark.parametrize(
    "space",
    [
        nas.NASNetSpace(),
        nas.NASNetSpace(pairs=2, operations=("identity", "sep_3x3")),
        nas.NASBench201Space(),
    ],
)
def test_built_in_spaces_need_nothing(tmp_path, monkeypatch, space) -> None:
    with small(tmp_path, space=space, cycles=20) as search:
        drive(search, lambda job: len(space.encode(job.architecture)))
    be_somebody_else(monkeypatch, tmp_path)
    result = nas.load("search", tmp_path)
    assert result.space.name == space.name and result.best.architecture
    nas.replay(result.reader, result.space)


def test_a_folder_may_be_read_from_another_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    nas.search(space=Bits(), evaluate=ones, **OPTIONS)
    result = nas.load("search")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert result.counts.results == 10
    assert result.resume(cycles=12).counts.results == 12
    assert known_code.is_known(result.reader.setup())
