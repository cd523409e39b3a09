"""Runs in a bucket, gs://..., here one in memory: it has no rename, and nothing can be added to."""

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.cli import main as cli
from gpipe_jax.run_folder import claim

CONFIG = """\
model: {kind: mlp, features: [64, 12, 10]}
data: {kind: digits, batch_size: 24}
train: {steps: 12, save_every: 5, keep: 9, workdir: gs://bucket/run}
"""


class Bucket(MemoryFileSystem):
    """Files in memory, by their addresses."""

    protocol = ("gs", "gcs")
    cachable = False
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs:/"))


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Return the path of a config whose working folder is in an empty bucket."""
    from orbax.checkpoint._src.path import gcs_utils

    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    # The question is sent to Google; buckets of both kinds are written alike.
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    for name, seconds in {"RENEW_S": 0.1, "LEASE_S": 0.5, "SETTLE_S": 0}.items():
        monkeypatch.setattr(claim, name, seconds)
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return str(path)


def steps() -> list[int]:
    return checkpoint_manifest.steps(epath.Path("gs://bucket/run/checkpoints"))


def layers(step: int) -> dict[str, bytes]:
    files = epath.Path(f"gs://bucket/run/checkpoints/{step}/state").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def held_out_loss(printed: str) -> str:
    return next(line.split()[1] for line in printed.splitlines() if line.startswith("test_loss "))


def test_a_run_in_a_bucket_is_cut_off_and_goes_on(config, tmp_path, capsys):
    assert cli.main(["train", config]) == 0 and steps() == [12, 10, 5]
    wanted = layers(12)
    assert len(wanted) == 3
    for path in list(Bucket.store):  # what a run leaves that dies while it saves step 12
        if path.endswith(("12/commit_success.txt", "12/state/manifest.json")):
            del Bucket.store[path]
    assert steps() == [10, 5]
    capsys.readouterr()
    assert cli.main(["train", config]) == 0
    said = capsys.readouterr()
    assert "damaged" not in said.err and "step 12/12" in said.out and "step 1/12" not in said.out
    assert steps() == [12, 10, 5] and layers(12) == wanted
    assert not any("damaged" in path for path in Bucket.store)


def test_a_run_in_a_bucket_is_evaluated_and_exported(config, tmp_path, capsys):
    assert cli.main(["train", config]) == 0
    trained = held_out_loss(capsys.readouterr().out)
    assert cli.main(["eval", "gs://bucket/run"]) == 0
    assert held_out_loss(capsys.readouterr().out) == trained
    assert cli.main(["export", "gs://bucket/run", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["layers.0.linear.kernel"].shape == (64, 12)


def test_two_runs_in_a_bucket(config, capsys):
    lock = epath.Path("gs://bucket/run/lock")
    lock.with_name("run.json").write_text('{"program": "gpipe-jax"}')
    with claim.claimed(lock):
        assert cli.main(["train", config]) == 1
    assert (
        "another run is using gs://bucket/run (see gs://bucket/run/lock)" in capsys.readouterr().err
    )
    lock.write_text("of a run that was killed")
    assert cli.main(["train", config]) == 0
    assert not lock.exists()


def test_a_run_in_a_bucket_whose_folder_is_taken_ends(config, monkeypatch, capsys):
    lock, save = epath.Path("gs://bucket/run/lock"), Saver.save

    def taken(self, *arguments):
        save(self, *arguments)
        lock.write_text("another run")

    monkeypatch.setattr(Saver, "save", taken)
    assert cli.main(["train", config]) == 1
    assert "another run is using gs://bucket/run" in capsys.readouterr().err
    assert steps() == [5] and lock.read_text() == "another run"


def test_files_of_someone_else_in_a_bucket(config, capsys):
    path = epath.Path("gs://bucket/run/config.yaml")
    path.write_text("mine")
    assert cli.main(["train", config]) == 2
    assert "to a run of gpipe train, and holds config.yaml" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_damage_in_a_bucket_is_set_aside(config, capsys):
    assert cli.main(["train", config]) == 0
    path = "/bucket/run/checkpoints/12/state/manifest.json"
    Bucket().pipe(path, b"{}")
    assert cli.main(["train", config]) == 0
    assert (
        "checkpoints/12 is damaged (manifest.json is malformed: crc32: Field r"
        in capsys.readouterr().err
    )
    assert steps() == [12, 10, 5] and any("12.damaged/state" in path for path in Bucket.store)


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_a_config_in_a_bucket(config, capsys, command):
    epath.Path("gs://bucket/c.yaml").write_text(CONFIG.replace("gs://bucket/run", "gs://bucket/2"))
    code = cli.main([command, "gs://bucket/c.yaml"])
    assert code == (2 if command == "eval" else 0)
    if command == "eval":
        assert "there is no checkpoint to evaluate" in capsys.readouterr().err
    assert cli.main([command, "gs://bucket/d.yaml"]) == 2
    assert "gs://bucket/d.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval"])
def test_addresses_whose_package_is_missing(monkeypatch, capsys, command):
    def missing(*_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", missing)
    assert cli.main([command, "gs://bucket/c.yaml"]) == 2
    assert "pip install" in capsys.readouterr().err
