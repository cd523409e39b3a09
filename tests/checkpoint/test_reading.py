"""Whatever is wrong with files of a checkpoint, older ones are found; what may pass stays."""

import errno
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from gpipe_jax.checkpoint import export, reading, safetensors
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.checkpoint.manifest import Manifest, RunInfo, UnusableStep
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.cli import main as cli
from gpipe_jax.errors import DamagedCheckpointError, UnreadableCheckpointError

ARRAYS = {"params.w": np.arange(6, dtype=np.float32).reshape(2, 3), "params.b": np.zeros(2, "i4")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write a run's checkpoints of steps 10 and 20."""
    saver = Saver(epath.Path(tmp_path / "checkpoints"), keep=9)
    for step in (10, 20):
        state = LayerTrees({"seed": np.uint32(0)}, {0: dict(ARRAYS)})
        saver.save(state, RunInfo(step, {}, None), ["Dense(3)"])
    saver.close()
    return tmp_path / "checkpoints"


def found(folder: Path) -> list[Manifest | UnusableStep]:
    """Return each checkpoint, read in full."""
    checked = []
    for manifest in checkpoint_manifest.manifests(epath.Path(folder)):
        if isinstance(manifest, Manifest):
            try:
                for name in manifest.files:
                    checkpoint_format.read_file(manifest, name)
            except (DamagedCheckpointError, UnreadableCheckpointError) as error:
                manifest = checkpoint_manifest.unusable(manifest.step, error)
        checked.append(manifest)
    return checked


def rewrite_manifest(folder: Path, change) -> None:
    """Change what a manifest says; its checksum is right."""
    path = folder / "20" / "state" / "manifest.json"
    content = json.loads(json.loads(path.read_text())["content"])
    changed = change(content)
    text = changed if isinstance(changed, str) else json.dumps(content)
    path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}))


def rewrite_layer(folder: Path, data: bytes) -> None:
    """Replace a layer's file; the manifest has its size and its checksum."""
    (folder / "20" / "state" / "0.safetensors").write_bytes(data)

    def change(content: dict) -> None:
        content["parts"]["0"] |= {"bytes": len(data), "crc32": zlib.crc32(data)}

    rewrite_manifest(folder, change)


def with_header(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


# --- what cannot be read --------------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["manifest.json", "0.safetensors"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_folder, "is not a regular file"),
        (a_link_loop, "is a link to itself"),
        (a_pipe, "is not a regular file"),
        (Path.unlink, "is missing"),
    ],
)
def test_something_else_in_place_of_a_file_is_damage(folder, name, change, reason):
    change(folder / "20" / "state" / name)
    newest, older = found(folder)
    assert newest == UnusableStep(20, f"{name} {reason}", is_damaged=True)
    assert isinstance(older, Manifest) and older.step == 10


@pytest.mark.parametrize("change", [a_folder, a_link_loop, Path.unlink])
def test_something_else_in_place_of_the_folder_is_damage(folder, change):
    shutil.rmtree(folder / "20")
    (folder / "20").write_text("a file")
    change(folder / "20")
    steps = [(each.step, getattr(each, "is_damaged", False)) for each in found(folder)]
    assert steps == ([(20, True), (10, False)] if change is not Path.unlink else [(10, False)])


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["manifest.json", "0.safetensors"])
def test_what_may_pass_is_no_damage(folder, monkeypatch, number, name):
    read = type(epath.Path(folder)).read_bytes

    def fails(path):
        if path.match(f"20/state/{name}"):
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(type(epath.Path(folder)), "read_bytes", fails)
    newest, older = found(folder)
    reason = f"{name} cannot be read: {os.strerror(number)}"
    assert newest == UnusableStep(20, reason, is_damaged=False)
    assert isinstance(older, Manifest) and older.step == 10


@pytest.mark.parametrize("name", ["0050", "٣", "1٣", "²", "9999999999", "20.damaged", "x"])
def test_folders_of_other_names_are_none_of_ours(folder, name):
    (folder / name).mkdir()
    assert checkpoint_manifest.steps(epath.Path(folder)) == [20, 10]
    saver = Saver(epath.Path(folder), keep=2)
    state = LayerTrees({"seed": np.uint32(0)}, {0: dict(ARRAYS)})
    saver.save(state, RunInfo(30, {}, None), ["Dense(3)"])
    saver.close()
    assert sorted(os.listdir(folder)) == sorted(["20", "30", name])


def test_a_step_that_could_not_be_read_is_neither_counted_nor_removed_and_makes_way(folder):
    saver = Saver(epath.Path(folder), keep=1, unusable={20})
    state = LayerTrees({"seed": np.uint32(0)}, {0: dict(ARRAYS)})
    wanted = {12: ["12", "20"], 20: ["20", "20.unreadable"], 30: ["20.unreadable", "30"]}
    for step, names in wanted.items():
        saver.save(state, RunInfo(step, {}, None), ["Dense(3)"])
        saver.wait()
        assert sorted(os.listdir(folder)) == names
    saver.close()


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    path = epath.Path(folder)

    def fails(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(path), "iterdir", fails)
    with pytest.raises(UnreadableCheckpointError, match="checkpoints cannot be read: Input/output"):
        checkpoint_manifest.steps(path)


def test_a_link_to_a_disk_that_is_not_there(tmp_path):
    (tmp_path / "checkpoints").symlink_to("/missing/disk")
    with pytest.raises(
        UnreadableCheckpointError, match="is a link to /missing/disk, which is missing"
    ):
        checkpoint_manifest.steps(epath.Path(tmp_path / "checkpoints"))


def test_an_error_of_a_buckets_client_may_pass(monkeypatch):
    class HttpError(Exception):
        pass

    class Remote:
        name = "manifest.json"

        def __str__(self):
            return "gs://bucket/manifest.json"

        def read_bytes(self):
            raise HttpError("503")

    with pytest.raises(UnreadableCheckpointError, match=r"manifest\.json cannot be read: 503"):
        reading.read_bytes(Remote())


# --- what is read is what it must be --------------------------------------------------------------


def without(content: dict, *path: str) -> None:
    for step in path[:-1]:
        content = content[step]
    del content[path[-1]]


def changed(content: dict, *path) -> None:
    *path, name, value = path
    for step in path:
        content = content[step]
    content[name] = value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: without(c, "parts"), "parts: Field required"),
        (lambda c: without(c, "step"), "step: Field required"),
        (lambda c: without(c, "versions"), "versions: Field required"),
        (lambda c: without(c, "parts", "0", "arrays"), "parts.0.arrays: Field required"),
        (lambda c: without(c, "format"), "format: None is not a number"),
        (lambda c: changed(c, "format", True), "format: True is not a number"),
        (lambda c: changed(c, "step", "20"), "step: Input should be a valid integer"),
        (lambda c: changed(c, "config", []), "config: Input should be"),
        (lambda c: changed(c, "metrics", {"test_loss": "low"}), "metrics.test_loss: Input"),
        (lambda c: changed(c, "parts", "0", "bytes", -1), "parts.0.bytes: Input should be great"),
        (lambda c: changed(c, "parts", "0", "arrays", "x", ["float32", [-1]]), "parts.0.arrays.x"),
        (lambda c: changed(c, "parts", "../../x", c["parts"]["0"]), "String should match"),
        (lambda c: "[]", "Input should be an object"),
        (lambda c: "null", "Input should be an object"),
        (lambda c: "[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        (lambda c: '{"format": 1, "config": ' + '{"a": ' * 9999 + "1", "recursion limit"),
    ],
)
def test_a_malformed_manifest_is_damage(folder, change, reason):
    rewrite_manifest(folder, change)
    newest, older = found(folder)
    assert isinstance(newest, UnusableStep) and newest.is_damaged
    assert newest.reason.startswith("manifest.json is malformed: ") and reason in newest.reason
    assert "\n" not in newest.reason and len(newest.reason) < 200
    assert isinstance(older, Manifest)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[]", '{"crc32": 1.5, "content": 2}'])
def test_a_manifest_that_is_no_manifest_is_damage(folder, text):
    (folder / "20" / "state" / "manifest.json").write_text(text)
    newest, _ = found(folder)
    assert isinstance(newest, UnusableStep) and newest.reason.startswith("manifest.json is malf")


W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "I32", "shape": [2], "data_offsets": [24, 32]}
PAYLOAD = np.arange(6, dtype=np.float32).tobytes() + bytes(8)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"w": {**W, "data_offsets": [-4, 20]}, "b": B}, "data_offsets.0: Input should be great"),
        (
            {"w": W, "b": {**B, "data_offsets": [16, 24]}},
            "w is at bytes 0 to 24, not 24 to 48|b is",
        ),
        ({"w": W, "b": {**B, "data_offsets": [28, 36]}}, "b is at bytes 28 to 36, not 24 to 32"),
        ({"w": W, "b": {**B, "shape": [3]}}, "b is at bytes 24 to 32, not 24 to 36"),
        ({"w": W, "b": {**B, "dtype": "F99"}}, "b has the unknown type 'F99'"),
        ({"w": W, "b": {**B, "shape": [2.0]}}, "shape.0"),
        ({"w": W, "b": {**B, "shape": [2**70, 0]}}, "b is at bytes 24 to 32, not 24 to 24"),
        ({"w": W, "b": {**B, "more": 1}}, "more: Extra inputs"),
        ({"w": W, "b": {"dtype": "I32"}}, "Field required|by texts only"),
        ({"w": W}, r"the arrays end at byte \d+ of \d+"),
        ([], "Input should be an object"),
    ],
)
def test_a_malformed_layer_file_is_damage_whatever_its_checksum(folder, header, reason):
    with pytest.raises(ValueError, match=reason):
        safetensors.read(with_header(header, PAYLOAD))
    rewrite_layer(folder, with_header(header, PAYLOAD))
    newest, older = found(folder)
    assert isinstance(newest, UnusableStep) and newest.is_damaged
    assert newest.reason.startswith("0.safetensors is malformed: ")
    assert isinstance(older, Manifest)


@pytest.mark.parametrize("data", [b"", b"1234567", bytes(8), (99).to_bytes(8, "little") + b"{}"])
def test_a_layer_file_without_a_header_is_malformed(data):
    with pytest.raises(ValueError, match=r"the header ends at byte \d+ of \d+"):
        safetensors.read(data)


def test_a_header_that_is_nested_too_deeply(folder):
    text = b"[" * 100_000
    with pytest.raises(ValueError, match="recursion limit"):
        safetensors.read(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({**ARRAYS, "params.w": ARRAYS["params.w"].astype(np.float16)}, "params.w was float32"),
        ({**ARRAYS, "params.w": ARRAYS["params.w"].reshape(3, 2)}, r"params.w was float32\[2, 3\]"),
        ({"params.w": ARRAYS["params.w"]}, "missing params.b|unknown params.b"),
    ],
)
def test_a_layer_file_must_hold_what_the_manifest_lists(folder, arrays, reason, tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        safetensors.write_all(file, arrays)
    rewrite_layer(folder, path.read_bytes())
    newest, _ = found(folder)
    assert isinstance(newest, UnusableStep)
    assert "0.safetensors is not as manifest.json describes it" in newest.reason
    assert any(part in newest.reason for part in reason.replace("\\", "").split("|"))


# --- gpipe export ---------------------------------------------------------------------------------


def test_export_takes_an_older_one_and_says_so(folder, tmp_path, capsys):
    a_folder(folder / "20" / "state" / "0.safetensors")
    out = tmp_path / "x.npz"
    mine = tmp_path / "x.npz.tmp"
    mine.write_text("mine")
    assert cli.main(["export", str(tmp_path), "--out", str(out)]) == 0
    assert "checkpoints/20: 0.safetensors is not a regular file" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(out)["layers.0.w"], ARRAYS["params.w"])
    assert mine.read_text() == "mine"


def test_export_of_what_cannot_be_read_now_is_no_bad_input(folder, tmp_path, monkeypatch, capsys):
    def fails(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(epath.Path(folder)), "read_bytes", fails)
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "x.npz")]) == 1
    said = capsys.readouterr().err
    assert "cannot be read: Permission denied" in said and "repair the disk or the perm" in said
    assert not (tmp_path / "x.npz").exists()


def test_export_has_the_averages_and_the_frozen_parameters_without_one():
    saved = ["average.w", "optimizer.w", "params.b", "params.w", "statistics.mean"]
    assert export.exported_names(saved, "3") == {
        "params.b": "layers.3.b",
        "average.w": "layers.3.w",
        "statistics.mean": "layers.3.mean",
    }
