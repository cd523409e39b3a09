"""Saved states come back exactly, or an error says what does not fit or is damaged."""

import errno
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from gpipe_jax.checkpoint import export
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
from gpipe_jax.checkpoint import safetensors as tensorfile
from gpipe_jax.checkpoint import save as saving
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.checkpoint.manifest import RunInfo
from gpipe_jax.checkpoint.save import Saver
from gpipe_jax.cli import main as cli
from gpipe_jax.errors import CheckpointFormatError, ConfigError, DamagedCheckpointError, SaveError
from gpipe_jax.training import resume
from gpipe_jax.utils import trees as names

NAMES = ["Dense(3)", "Norm()", "Head() [tied]"]


def make_state(seed: int = 0, size: int = 4) -> LayerTrees:
    """Draw a state with statistics, a moving average, and None for a borrowed parameter."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    trees = [
        {"linear": {"kernel": draw(size, 2), "bias": np.arange(2, dtype=ml_dtypes.bfloat16)}},
        {},
        {"linear": {"kernel": None, "scale": np.float32(seed), "flags": np.array([True])}},
    ]
    norm = {"mean": draw(3), "count": np.array([], np.int32), "rest": {0: draw(1)}}
    stats = [{}, {"norm": norm}, {}]
    layers = {
        i: {"params": tree, "statistics": stats[i], "optimizer.0.mu": tree}
        for i, tree in enumerate(trees)
    }
    common = {"seed": np.uint32(seed), "optimizer.1.count": np.int32(7)}
    return LayerTrees(common, layers)


def shapes(state: LayerTrees) -> LayerTrees:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), state)


def save(folder, *steps: int, state=None, losses=(), **options) -> epath.Path:
    saver = Saver(epath.Path(folder), **{"keep": 9, **options})
    for i, step in enumerate(steps):
        metrics = {"test_loss": losses[i]} if losses else None
        one = make_state(step) if state is None else state
        saver.save(one, RunInfo(step, {"a": 1}, metrics), NAMES)
    saver.close()
    return epath.Path(folder)


def load(folder, step: int, like: LayerTrees, names=NAMES) -> LayerTrees:
    saved = checkpoint_format.load(checkpoint_manifest.read_manifest(folder, step), like, names)
    return LayerTrees(saved.common, {i: saved.layers[i] for i in saved.layers})


def newest_whole(folder) -> int | None:
    """Return the step that a reader would take, and check that it is as it was saved."""
    for found in checkpoint_manifest.manifests(folder):
        if isinstance(found, checkpoint_manifest.Manifest):
            try:
                state = load(folder, found.step, shapes(make_state()))
            except DamagedCheckpointError:
                continue
            jax.tree.map(np.testing.assert_array_equal, state, make_state(found.step))
            return found.step
    return None


# --- what is saved -------------------------------------------------------------------------------


def test_roundtrip_is_exact(tmp_path):
    folder, state = save(tmp_path / "with a space", 5), make_state(5)
    found = load(folder, 5, shapes(state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, state)
    assert found.layers[2]["params"]["linear"]["kernel"] is None


def test_the_manifest_says_what_it_is(tmp_path):
    manifest = checkpoint_manifest.read_manifest(save(tmp_path, 5, losses=[0.5]), 5)
    assert (manifest.step, manifest.config, manifest.metrics) == (5, {"a": 1}, {"test_loss": 0.5})
    assert set(manifest.files) == {"0", "1", "2", "common"}
    first = manifest.files["0"]
    assert first["description"] == NAMES[0]
    assert first["arrays"]["params.linear.kernel"] == ["float32", [4, 2]]
    assert first["arrays"]["params.linear.bias"] == ["bfloat16", [2]]
    assert manifest.versions["jax"] == jax.__version__
    data = (manifest.path / "0.safetensors").read_bytes()
    assert (first["bytes"], first["crc32"]) == (len(data), zlib.crc32(data))


def test_a_manifest_of_an_older_version_lacks_later_fields(tmp_path):
    path = save(tmp_path, 5) / "5" / "state" / "manifest.json"
    content = json.loads(json.loads(path.read_text())["content"])
    del content["data"]
    text = json.dumps(content)
    path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": text}))
    assert checkpoint_manifest.read_manifest(epath.Path(tmp_path), 5).data == {}


def test_files_are_safetensors(tmp_path):
    """Compare with what the library of the format reads and writes."""
    path = save(tmp_path, 5) / "5" / "state" / "2.safetensors"
    found = safetensors.numpy.load_file(path)
    wanted = {k: v for k, v in make_state(5).layers[2]["params"]["linear"].items() if k != "kernel"}
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[f"params.linear.{name}"], value)
    theirs = tensorfile.read(safetensors.numpy.save(found))
    jax.tree.map(np.testing.assert_array_equal, theirs, found)


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = [0.5, 0.1, 0.4, 0.3, 0.2]
    save(tmp_path, 2, 10, 20, losses=losses, keep=2, keep_best=1)
    assert checkpoint_manifest.steps(epath.Path(tmp_path)) == [20, 10]
    save(tmp_path, 30, 40, losses=losses[3:], keep=2, keep_best=1)
    assert checkpoint_manifest.steps(epath.Path(tmp_path)) == [40, 30, 10], "10 was the best"


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint_manifest.steps(epath.Path(tmp_path / "nothing")) == []
    assert not (tmp_path / "nothing").exists()
    assert list(checkpoint_manifest.manifests(epath.Path(tmp_path))) == []


def test_everything_that_does_not_fit_is_listed(tmp_path):
    folder, state = save(tmp_path, 1), make_state(1)
    linear = {"kernel": np.zeros((4, 5)), "gain": np.zeros(2)}
    params = {**state.layers[0], "params": {"linear": linear}}
    layers = {0: params, 1: state.layers[1], 3: state.layers[2]}
    wanted = (
        r"checkpoint .*1 does not fit this run: missing layer 3; unknown layer 2; "
        r"layer 0: missing params.linear.gain; layer 0: unknown params.linear.bias; "
        r"layer 0: params.linear.kernel was float32\[4, 2\], is float64\[4, 5\] now; "
        r"layer 1: was Norm\(\), is Scale\(\) now$"
    )
    with pytest.raises(ValueError, match=wanted):
        load(
            folder, 1, shapes(LayerTrees(state.common, layers)), [NAMES[0], "Scale()", "", "Head()"]
        )


def test_an_average_is_neither_dropped_nor_made_up(tmp_path):
    folder, state = save(tmp_path, 1), make_state(1)
    averaged = {i: {**trees, "average": trees["params"]} for i, trees in state.layers.items()}
    more = LayerTrees(state.common, averaged)
    with pytest.raises(ValueError, match=r"layer 0: missing average.linear.kernel"):
        load(folder, 1, shapes(more))
    folder = save(tmp_path / "more", 1, state=more)
    with pytest.raises(ValueError, match=r"layer 0: unknown average.linear.kernel"):
        load(folder, 1, shapes(state))


def test_a_format_of_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manifest, "FORMAT", 99)
    folder = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointFormatError, match=r"has format 99, this version reads 1; use the version"
    ):
        checkpoint_manifest.read_manifest(folder, 1)


def test_older_checkpoints_of_another_format_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manifest, "FORMAT", 99)
    save(tmp_path, 1)
    monkeypatch.undo()
    save(tmp_path, 2, 3, losses=[0.1, 0.2], keep_best=1)
    assert checkpoint_manifest.steps(save(tmp_path, 4, losses=[0.3], keep_best=1, keep=1)) == [4, 2]


def test_a_format_of_another_version_is_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_manifest, "FORMAT", 99)
    save(tmp_path / "checkpoints", 1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="has format 99"):
        resume.newest(epath.Path(tmp_path / "checkpoints"), None, lambda manifest: None)
    out = tmp_path / "x.safetensors"
    assert cli.main(["export", str(tmp_path), "--out", str(out)]) == 2
    assert "has format 99, this version reads 1; use the version" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_system_whose_package_is_missing_is_bad_input(monkeypatch):
    def missing(folder):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(checkpoint_manifest, "steps", missing)
    remedy = r"install gcsfs .*; for gs:// run pip install 'gpipe-jax\[tpu\]'"
    with pytest.raises(ConfigError, match=remedy):
        resume.newest(epath.Path("gs://bucket/run"), None, lambda manifest: None)
    with pytest.raises(ConfigError, match=remedy):
        export.export(epath.Path("gs://bucket/run"), Path("x.npz"))


def test_leaves_of_one_name():
    with pytest.raises(ValueError, match=r"two leaves of a tree are named 'a\.b'; use keys"):
        names.by_name({"a.b": 1, "a": {"b": 2}})


LAYER = {"0": {}, "common": {}}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([LAYER], "1 of 2 processes wrote"),
        ([LAYER, {"2": {}}], "not each of"),
        ([LAYER, {"0": {}}], "not each of"),
        ([{"0": {}}, {"1": {}}], "not each of"),
        ([LAYER, {}], "not each of"),
    ],
)
def test_no_manifest_without_all_layers(tmp_path, monkeypatch, written, message):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for i, parts in enumerate(written):
        (tmp_path / f"process_{i}.json").write_text(json.dumps(parts))
    with pytest.raises(OSError, match=message):
        files = saving._LayerFiles()
        files._num_layers = 2
        files.finalize(epath.Path(tmp_path))
    assert not (tmp_path / "manifest.json").exists()


# --- damage --------------------------------------------------------------------------------------


def damage(folder: Path, kind: str, rng: random.Random) -> None:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    path = rng.choice(files)
    if kind == "deleted manifest":
        path = folder / "manifest.json"
    data = bytearray(path.read_bytes())
    if kind == "truncated file":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped byte":
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    return Path(save(tmp_path_factory.mktemp("three"), 10, 20, 30))


KINDS = ["truncated file"] * 20 + ["flipped byte"] * 20 + ["deleted file"] * 5
KINDS += ["deleted manifest"] * 5


@pytest.mark.parametrize(("case", "kind"), list(enumerate(KINDS)))
def test_damage_is_noticed_and_the_newest_whole_one_is_read(three, tmp_path, case, kind):
    subprocess.run(["cp", "-r", f"{three}/.", str(tmp_path)], check=True)
    folder, rng = epath.Path(tmp_path), random.Random(case)
    assert newest_whole(folder) == 30
    damage(tmp_path / "30" / "state", kind, rng)
    assert newest_whole(folder) == 20
    if case % 5 == 0:
        damage(tmp_path / "20" / "state", kind, rng)
        assert newest_whole(folder) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.with_name("0.safetensors").unlink(), r"^0.safetensors is missing$"),
        (lambda p: os.truncate(p.with_name("0.safetensors"), 9), r"has 9 bytes, not \d"),
        (lambda p: p.unlink(), r"^manifest.json is missing$"),
        (lambda p: p.write_text("{}"), r"^manifest.json is malformed: crc32: Field req"),
        (lambda p: p.write_text('{"crc32": 1, "content": "{}"}'), "does not have its checksum"),
        (lambda p: p.write_bytes(
            (p.parents[2] / "10" / "state" / p.name).read_bytes()), "that of step 10$"),
    ],
)  # fmt: skip
def test_the_words_for_damage(three, tmp_path, change, message):
    subprocess.run(["cp", "-r", f"{three}/.", str(tmp_path)], check=True)
    change(tmp_path / "30" / "state" / "manifest.json")
    with pytest.raises(DamagedCheckpointError, match=message):
        load(epath.Path(tmp_path), 30, shapes(make_state()))


def test_one_that_was_never_finished_is_cleared_away(tmp_path):
    """Remove at the next start what SIGKILL leaves of a save; it is no checkpoint."""
    folder = save(tmp_path, 10)
    half = tmp_path / "20.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "0.safetensors").write_bytes(b"half")
    assert newest_whole(folder) == 10
    save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_leaves_what_was_there(small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 10)
    message = r"cannot save into .*: No space left on device; free space there, or lower train.keep"
    with pytest.raises(SaveError, match=message):
        save(folder, 20, state=make_state(20, size=100_000))
    assert [path.name for path in folder.iterdir()] == ["10"], "the space is free again"
    assert newest_whole(epath.Path(folder)) == 10
    save(folder, 30)
    assert newest_whole(epath.Path(folder)) == 30


@pytest.mark.parametrize(
    ("number", "times", "is_saved"),
    [(errno.EIO, 1, True), (errno.EIO, 2, False), (errno.EACCES, 1, False)],
)
def test_a_write_that_fails_once_is_tried_again(
    tmp_path, monkeypatch, capsys, number, times, is_saved
):
    write, calls = checkpoint_format.write_file, []

    def fails(folder, name, *rest):
        calls.append(name)
        if name == "1" and calls.count("1") <= times:
            raise OSError(number, os.strerror(number))
        return write(folder, name, *rest)

    monkeypatch.setattr(checkpoint_format, "write_file", fails)
    monkeypatch.setattr(saving, "RETRY_S", 0)
    if is_saved:
        assert newest_whole(save(tmp_path, 10)) == 10
        assert "1 (Input/output error); trying once more" in capsys.readouterr().err
    else:
        message = f"cannot save into {tmp_path}: {os.strerror(number)}; earlier checkpoints"
        with pytest.raises(SaveError, match=message):
            save(tmp_path, 10)
        assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match=r"cannot save into .*file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 10)


def test_reading_needs_no_orbax(three):
    code = f"""
import sys
from etils import epath
from gpipe_jax.checkpoint import format as checkpoint_format
from gpipe_jax.checkpoint import manifest as checkpoint_manifest
manifest = checkpoint_manifest.read_manifest(epath.Path({str(three)!r}), 30)
for part in manifest.files:
    checkpoint_format.read_file(manifest, part)
print("orbax" in sys.modules, "orbax.checkpoint" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.lower().split()[1]) is False
