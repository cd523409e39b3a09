"""TensorBoard, W&B and the profiler: a run tells them what it writes, and only when asked."""

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

import gpipe_jax as gpipe
from gpipe_jax.cli import main as cli
from gpipe_jax.errors import ConfigError
from gpipe_jax.training import from_config, metrics, profiling, run, writers
from gpipe_jax.training.profiling import Profile

CONFIG = {
    "model": {"kind": "mlp", "features": [64, 12, 10]},
    "data": {"kind": "digits", "batch_size": 24},
    "optimizer": {"kind": "sgd"},
    "train": {
        "steps": 8,
        "eval_every": 4,
        "log_every": 3,
        "writers": ["tensorboard", "wandb"],
    },
    "profile": {"start": 3, "steps": 2},
}


class FakeWandb(types.ModuleType):
    """Keeps what W&B would be told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict] = []

    def init(self, **options: Any) -> "FakeWandb":
        self.runs.append({**options, "logged": {}, "finished": False})
        return self

    def log(self, values: dict, step: int) -> None:
        self.runs[-1]["logged"].setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.runs[-1]["finished"] = True


def events(folder: Path) -> list[Event]:
    """Return the events of all files in a folder, oldest file first (TFRecord framing)."""
    found = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            found.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += length + 16
    return found


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def told(records: list[dict]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in records:
        found.setdefault(record["step"], {}).update(record)
        found[record["step"]].pop("step", None)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeWandb, list[dict]]:
    """Run four steps, then four more; return the folder, W&B's calls and the metrics file."""
    workdir, wandb = tmp_path_factory.mktemp("writers") / "a run", FakeWandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        parts = from_config.assemble(gpipe.load(CONFIG), workdir)

        def stop(record: dict) -> None:
            if record["step"] == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.train(parts, stop)
        assert wandb.runs[0]["finished"]
        run.train(parts, lambda record: None)
    return workdir, wandb, list(metrics.read(parts.workdir / "metrics.jsonl"))


def test_tensorboard_has_what_the_metrics_file_has(ran) -> None:
    workdir, _, records = ran
    found, wanted = scalars(workdir / "tensorboard"), told(records)
    assert set(wanted) == {1, 3, 4, 6, 8} and "test_accuracy" in wanted[8]
    assert found.keys() == wanted.keys()
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, rel=1e-6)


def test_a_continued_run_hides_the_events_that_it_repeats(ran) -> None:
    restarts = [e.step for e in events(ran[0] / "tensorboard") if e.HasField("session_log")]
    assert restarts == [1, 5]


def test_wandb_is_told_the_same_in_one_run(ran) -> None:
    workdir, wandb, records = ran
    first, second = wandb.runs
    assert first["id"] == second["id"] == (workdir / "wandb_id").read_text()
    assert first["resume"] == "allow" and first["name"] == "a run"
    assert first["config"]["model"]["features"] == [64, 12, 10]
    assert {**first["logged"], **second["logged"]} == told(records) and second["finished"]


def test_the_steps_asked_for_are_traced(ran) -> None:
    traces = list((ran[0] / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("step", "until", "traced"),
    [(0, 2, False), (1, 2, False), (2, 4, True), (3, 4, True), (4, None, False), (9, None, False)],
)
def test_where_a_trace_begins_and_ends(tmp_path, monkeypatch, step, until, traced) -> None:
    monkeypatch.setattr(profiling, "traced_into", lambda folder: folder)
    profile = Profile(3, 2, tmp_path)
    assert profile.until(step) == until
    assert (profile.over(step) == tmp_path) == traced
    assert profile._replace(folder=None).over(2) != tmp_path
    assert Profile(3, 0, tmp_path).until(0) is None and Profile(3, 0, tmp_path).over(2) != "x"


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    steps = []
    with profiling.traced_into(tmp_path / "file" / "profile"):
        steps.append(1)
    assert steps == [1]
    said = capsys.readouterr().err
    assert f"no trace in {tmp_path}/file/profile: " in said and said.count("\n") == 1
    with pytest.raises(ZeroDivisionError), profiling.traced_into(tmp_path / "profile"):
        raise ZeroDivisionError
    with profiling.traced_into(tmp_path / "a"), profiling.traced_into(tmp_path / "b"):
        pass  # one trace at a time
    said = capsys.readouterr().err
    assert f"no trace in {tmp_path}/b: " in said and said.count("\n") == 1
    assert (tmp_path / "a").exists()


def test_without_asking_nothing_is_written(tmp_path: Path) -> None:
    with writers.opened((), tmp_path, {}, 0) as found:
        assert found == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "package"), writers.PACKAGES.items())
def test_a_missing_package(tmp_path, monkeypatch, capsys, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(
        f"model: {{kind: mlp}}\ndata: {{kind: digits}}\ntrain:\n  writers: [{name}]\n"
    )
    assert cli.main(["train", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"x.yaml:4: train: `writers`: {name} needs {package} (" in said
    assert f"run pip install 'gpipe-jax[{name}]'" in said


class Broken:
    """Fail as a writer whose disk or network fails."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def write(self, record: dict) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise RuntimeError("the server is gone")


def test_a_run_goes_on_without_a_writer_that_fails(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(writers.WRITERS, "tensorboard", Broken)
    with writers.opened(["tensorboard"], tmp_path, {}, 0) as (writer,):
        for _ in range(3):
            writer.write({"step": 1})
        assert writer._writer.calls == 1
    with writers.opened(["tensorboard"], tmp_path, {}, 0):
        pass  # the end of a run is not one of its failure either
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "gpipe: tensorboard: [Errno 28] No space left on device; the run continues without it",
        "gpipe: tensorboard: the server is gone; the run continues without it",
    ]


def test_if_one_writer_cannot_be_opened_the_others_are_closed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(writers.WRITERS, "tensorboard", Broken)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigError, match="wandb cannot be opened"),
        writers.opened(["tensorboard", "wandb"], tmp_path, {}, 0),
    ):
        pass
    assert "tensorboard: the server is gone" in capsys.readouterr().err, "`close` says so"


@pytest.mark.parametrize("content", [b"", b"two words", b"\xff\xfe"])
def test_an_id_that_is_none_is_bad_input(tmp_path, monkeypatch, content: bytes) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    (tmp_path / "wandb_id").write_bytes(content)
    with (
        pytest.raises(ConfigError, match=r"wandb cannot be opened \(.*holds .*; remove it"),
        writers.opened(["wandb"], epath.Path(tmp_path), {}, 0),
    ):
        pass
    assert (tmp_path / "wandb_id").read_bytes() == content
