"""Test that a file is written whole or not at all."""

import os
import re
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


@pytest.mark.parametrize("name", ["a.txt.tmp", "a.txt.1.tmp", "a.txt.draft"])
def test_files_of_others_are_neither_replaced_nor_removed(tmp_path: Path, name: str) -> None:
    other, path = tmp_path / name, tmp_path / "a.txt"
    other.write_text("mine")
    with pytest.raises(ValueError), atomic_files.replacing(path):
        raise ValueError
    atomic_files.write_text(path, "text")
    atomic_files.remove_drafts(path)
    assert other.read_text() == "mine" and sorted(os.listdir(tmp_path)) == sorted(["a.txt", name])


def test_each_draft_is_a_new_file_that_a_killed_process_leaves_until_it_is_removed(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.a.txt"
    with atomic_files.replacing(path) as one, atomic_files.replacing(path) as two:
        assert one != two and one.exists() and two.exists()
        one.write_text("1")
        two.write_text("2")
    left = [each.with_name(f"{each.name}.{'0' * 16}.tmp") for each in (path, other)]
    for draft in left:  # of processes that were killed
        draft.write_text("half")
    assert path.read_text() == "1" and path.stat().st_mode == left[0].stat().st_mode
    atomic_files.remove_drafts(path)
    assert [draft.exists() for draft in left] == [False, True]


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    path, target = tmp_path / "a.txt", tmp_path / "precious"
    target.write_text("precious")
    path.symlink_to(target)
    atomic_files.write_text(path, "text")
    assert path.read_text() == "text" and target.read_text() == "precious"


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
