"""Take the folders of runs only, and replace no other files."""

import errno
import json
import os
import shutil

import pytest
from etils import epath

from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.checkpoint.manifest import RunInfo
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.errors import ConfigError, RunInUseError
from gpipe_jax.run_folder import folder as folders
from gpipe_jax.run_folder.folder import MARKER, NAMES, exclusive


def take(path) -> None:
    with exclusive(epath.Path(path)):
        pass


def save_a_checkpoint(path) -> None:
    saver = Saver(epath.Path(path) / "checkpoints", keep=1)
    saver.save(LayerTrees({}, {}), RunInfo(10, {}, None), [])
    saver.close()


# --- whose folder it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_file_of_that_name_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"does not belong to a run .* holds {name}, which"):
        take(tmp_path)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("target", ["precious", "missing"])
def test_a_link_is_refused_and_not_followed(tmp_path, target):
    (tmp_path / "precious").write_text("mine")
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in ("lock", "checkpoints"):
        (workdir / name).symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match=r"holds lock, checkpoints, .*another folder \(train"):
        take(workdir)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "missing").exists()


def test_other_files_and_empty_folders_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "profile").mkdir()
    (tmp_path / "checkpoints").symlink_to("elsewhere")
    take(tmp_path)
    take(tmp_path)
    assert json.loads((tmp_path / MARKER).read_text()) == {
        "program": "gpipe-jax",
        "has_saved": False,
    }


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"program": "other"}', "mine"])
def test_a_marker_of_someone_else_is_none(tmp_path, text):
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(ConfigError, match=f"holds {MARKER}"):
        take(tmp_path)
    assert (tmp_path / MARKER).read_text() == text


def test_a_folder_of_an_earlier_version_is_taken(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "config.yaml").write_text("train:\n  steps: 3\n  workdir: null\n")
    with pytest.raises(ConfigError, match=r"holds config\.yaml, metrics\.jsonl, lock"):
        take(tmp_path)
    (tmp_path / "config.yaml").write_text(f"train:\n  steps: 3\n  workdir: {tmp_path}\n")
    take(tmp_path)
    assert (tmp_path / MARKER).exists()


def test_checkpoints_of_ours_show_a_folder_of_an_earlier_version(tmp_path):
    (tmp_path / "checkpoints" / "100" / "default").mkdir(parents=True)  # of another library
    with pytest.raises(ConfigError, match="holds checkpoints"):
        take(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    save_a_checkpoint(tmp_path)
    take(tmp_path)


def test_a_bucket_whose_client_is_not_installed(monkeypatch):
    def missing(*_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(folders, "_read_marker", missing)
    with pytest.raises(ConfigError, match=r"Please install gcsfs; for gs:// .*pip install"):
        take("gs://bucket/run")


def test_what_lies_in_the_lock_stays(tmp_path):
    take(tmp_path)
    (tmp_path / "lock").write_text("a note")
    take(tmp_path)
    assert (tmp_path / "lock").read_text() == "a note"


def test_drafts_of_killed_runs_are_removed_and_files_like_them_are_not(tmp_path):
    take(tmp_path)
    (tmp_path / f"config.yaml.{'0' * 16}.tmp").touch()
    (tmp_path / "config.yaml.tmp").touch()
    take(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml.tmp", "lock", MARKER]


def test_two_runs_that_begin_at_once(tmp_path):
    """Give one of them the folder; the other says that it is in use, not that it is foreign."""
    with (
        exclusive(epath.Path(tmp_path)),
        pytest.raises(RunInUseError, match="another run is using"),
    ):
        take(tmp_path)


def test_a_file_system_without_locks_has_claims(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    monkeypatch.setattr("gpipe_jax.run_folder.claim.SETTLE_S", 0)
    monkeypatch.setattr("gpipe_jax.run_folder.claim.LEASE_S", 0.2)
    monkeypatch.setattr("gpipe_jax.run_folder.claim.RENEW_S", 0.02)
    take(tmp_path)
    assert not capsys.readouterr().err, "the lock itself is no claim to wait for"
    with (
        exclusive(epath.Path(tmp_path)),
        pytest.raises(RunInUseError, match="another run is using"),
    ):
        take(tmp_path)
    take(tmp_path)


# --- a new start ----------------------------------------------------------------------------------


def test_a_run_whose_checkpoints_are_lost_does_not_begin_again(tmp_path):
    with exclusive(epath.Path(tmp_path)) as folder:
        folder.begin()
        folder.note_saved()
    with (
        exclusive(epath.Path(tmp_path)) as folder,
        pytest.raises(ConfigError, match=r"has saved checkpoints, but .*/checkpoints has none now"),
    ):
        folder.begin()
    (tmp_path / MARKER).unlink()
    (tmp_path / "config.yaml").write_text("train:\n  workdir: here\n")
    with exclusive(epath.Path(tmp_path)) as folder:
        folder.begin()  # the remedy of the message


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    for i, kept in enumerate(["metrics.jsonl.kept", "metrics.jsonl.kept-1"]):
        with exclusive(epath.Path(tmp_path)) as folder:
            metrics.write_text(f"{i}\n")
            folder.begin()
        assert (tmp_path / kept).read_text() == f"{i}\n" and not metrics.exists()
        said = capsys.readouterr().err
        assert "has no checkpoint, so the run starts from step 0" in said and kept in said
    with exclusive(epath.Path(tmp_path)) as folder:
        metrics.touch()
        folder.begin()
    assert not capsys.readouterr().err, "there is nothing to keep"


def test_a_marker_that_cannot_be_written_is_said_and_written_later(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with exclusive(epath.Path(tmp_path)) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(folders.atomic_files, "write_text", full)
            folder.note_saved()
        assert f"cannot write {tmp_path / MARKER}: [Errno 28] No space" in capsys.readouterr().err
        folder.note_saved()
    assert json.loads((tmp_path / MARKER).read_text())["has_saved"]


def test_steps_of_an_unreadable_folder_do_not_hide_the_refusal(tmp_path, monkeypatch):
    def fails(folder):
        raise folders.UnreadableCheckpointError("cannot be read")

    (tmp_path / "config.yaml").write_text("mine")
    monkeypatch.setattr(checkpoint_manifest, "steps", fails)
    with pytest.raises(ConfigError, match=r"holds config\.yaml"):
        take(tmp_path)
