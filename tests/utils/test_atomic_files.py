"""Test that a file is written whole or not at all."""

import os
import re
import threading
from pathlib import Path

import pytest

from gpipe_jax.utils import atomic_files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "två"):
        atomic_files.write_text(path, text, durable=durable)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_draft(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_files.replacing(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_files.replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old" and draft.parent == tmp_path
        assert re.fullmatch(re.escape(path.name) + atomic_files.DRAFT_SUFFIX, draft.name)
    assert path.read_text() == "new"


def test_only_a_file_of_several_writers_has_drafts_of_several_names(tmp_path: Path) -> None:
    """Replace the draft that a killed process leaves; do not add another."""
    path, names = tmp_path / "a.txt", {True: set(), False: set()}

    def write(shared: bool) -> None:
        with atomic_files.replacing(path, shared=shared) as draft:
            draft.write_text("text")
            names[shared].add(draft.name)

    for shared in (False, True):
        write(shared)
        thread = threading.Thread(target=write, args=[shared])
        thread.start()
        thread.join()
    assert names[False] == {"a.txt.tmp"} and len(names[True]) == 2
    for name in names[False] | names[True]:
        assert re.fullmatch(re.escape(path.name) + atomic_files.DRAFT_SUFFIX, name)


def test_a_durable_file_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, existed = tmp_path / "a.txt", []
    sync = os.fsync

    def note(descriptor: int) -> None:
        existed.append(path.exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    atomic_files.write_text(path, "text")
    assert existed == []
    path.unlink()
    atomic_files.write_text(path, "text", durable=True)
    assert existed == [False, True]  # the file, then its folder


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_files.write_text(tmp_path / "missing" / "a.txt", "text")
