"""Keep whole records, in order, whatever is in the metrics file and whatever fails."""

import errno
import os

import pytest
from etils import epath

from gpipe_jax.errors import SaveError
from gpipe_jax.training import metrics
from gpipe_jax.training.metrics import MetricsLog


def ignore(record: dict) -> None:
    pass


def opened(path, step: int = 0, evaluated: bool = True) -> MetricsLog:
    return MetricsLog(epath.Path(path), 1, step, evaluated=evaluated, show=ignore)


def steps_in(path) -> list[int]:
    return [record["step"] for record in metrics.read(epath.Path(path))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


RECORDS = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n'


@pytest.mark.parametrize(
    "line",
    [
        "a note",
        "[" * 100_000,
        '{"step": ' + '{"a": ' * 9999,
        '{"loss": 1.0}',
        '{"step": "3", "loss": 1.0}',
        '{"step": 3, "loss": "low"}',
        '{"step": 3, "loss": null}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1.5}',
        "[3]",
        "\xff",
    ],
)
def test_lines_that_are_no_records_are_skipped_and_kept(path, line, capsys):
    path.write_bytes(f"{RECORDS}{line}\n".encode("latin-1"))
    before = path.read_bytes()
    assert steps_in(path) == [1, 2]
    log = opened(path, step=2)
    assert [record["step"] for record in log.records] == [1, 2]
    assert path.with_name("metrics.jsonl.kept").read_bytes() == before
    assert f"{path} has lines that are not records, such as line 3" in capsys.readouterr().err
    assert steps_in(path) == [1, 2]


@pytest.mark.parametrize("end", ["", '{"step": 3, "lo', '{"step": 3, "loss": 1}'])
def test_a_last_line_without_an_end(path, end, capsys):
    path.write_text(RECORDS + end)
    assert steps_in(path) == [1, 2, 3][: 3 if end.endswith("}") else 2]
    opened(path, step=2)
    assert os.listdir(path.parent) == ["metrics.jsonl"] and not capsys.readouterr().err


class FullDisk:
    """Fail to append until `is_full` is false, after half a line."""

    def __init__(self, monkeypatch) -> None:
        self.is_full = True
        monkeypatch.setattr(metrics, "open", self.open, raising=False)

    def open(self, path, mode, encoding):
        if self.is_full:
            with open(path, mode, encoding=encoding) as file:
                file.write('{"st')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode, encoding=encoding)


def test_a_full_disk_ends_no_run_and_loses_no_record(path, monkeypatch, capsys):
    log, disk = opened(path), FullDisk(monkeypatch)
    for step in (1, 2):
        log.step({"step": step, "loss": 1.0})
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"gpipe: cannot write {path}: No space left on device; the run continues, and "
        f"writes the file again before its next checkpoint"
    ]
    disk.is_full = False
    log.step({"step": 3, "loss": 1.0})
    log.sync()
    log.step({"step": 4, "loss": 1.0})
    assert steps_in(path) == [1, 2, 3, 4] and len(path.read_text().splitlines()) == 4


def test_a_checkpoint_waits_for_its_records(path, monkeypatch):
    log, _ = opened(path), FullDisk(monkeypatch)
    message = rf"cannot write {path}: No space left on device; free space there, or correct"
    with pytest.raises(SaveError, match=message):
        log.sync()


@pytest.mark.parametrize("step", [0, 5])
def test_a_file_that_cannot_be_read_is_not_replaced(path, step):
    path.mkdir()
    with pytest.raises(SaveError, match=rf"cannot write {path}: Is a directory"):
        opened(path, step)
    assert path.is_dir()


def test_a_record_is_written_before_it_is_shown(path):
    """Lose none to a terminal that is gone."""

    def fails(record: dict) -> None:
        raise BrokenPipeError

    log = MetricsLog(epath.Path(path), 1, 0, evaluated=True, show=fails)
    with pytest.raises(BrokenPipeError):
        log.step({"step": 1, "loss": 1.0})
    assert steps_in(path) == [1]
