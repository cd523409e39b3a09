"""Write the metrics file of a run: one JSON object per line, for logged steps and evaluations."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import pydantic
from etils import epath

from gpipe_jax.checkpoint import reading
from gpipe_jax.errors import SaveError
from gpipe_jax.run_folder.folder import keep_aside
from gpipe_jax.training.writers import Writer
from gpipe_jax.utils.atomic_files import is_local, write_text
from gpipe_jax.utils.messages import say

_RECORD = pydantic.TypeAdapter(dict[str, int | float])

Show = Callable[[dict], None]


class MetricsLog:
    """Write `metrics.jsonl`: the first step, every `every`-th step, and every evaluation.

    Records after `step`, where the run resumes, are dropped, because they are written again. A file
    with invalid lines is kept under another name. If a record cannot be written, the next `sync`
    writes it.

    Args:
        path: The file; None writes none, as in all processes but the first.
        every: Steps between records.
        step: The step at which the run resumes, or 0.
        evaluated: Whether `step` is evaluated already; else its evaluation is dropped too.
        show: A function that gets every record, including those that are not written.
        writers: Further writers of the records that are written.
    """

    def __init__(
        self,
        path: epath.Path | None,
        every: int,
        step: int,
        *,
        evaluated: bool,
        show: Show,
        writers: Sequence[Writer] = (),
    ) -> None:
        self.path, self.every, self.show, self.writers = path, every, show, writers
        self.records: list[dict] = []
        self._is_behind = False  # whether the file lacks records
        if path is None:
            return

        def stays(record: dict) -> bool:
            is_of_this_step = "loss" in record or evaluated
            return record["step"] < step or (record["step"] == step and is_of_this_step)

        with _errors_are_save_errors(path):
            found = [_record(line) for line in _lines_of(path)]
            self.records = [record for record in found if record is not None and stays(record)]
            if None in found:
                say(
                    f"{path} has lines that are not records, such as line "
                    f"{found.index(None) + 1}; the old file is kept in {keep_aside(path)}"
                )
            write_text(path, self._text(), durable=True)

    def step(self, record: dict) -> None:
        """Write the record of a training step if it is due, and show it."""
        if record["step"] % self.every == 0 or record["step"] == 1:
            self._write(record)
        self.show(record)

    def evaluation(self, record: dict) -> None:
        """Write and show the record of an evaluation."""
        self._write(record)
        self.show(record)

    def _write(self, record: dict) -> None:
        self.records.append(record)
        for writer in self.writers:
            writer.write(record)
        if self.path is None or self._is_behind or not is_local(self.path):
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._is_behind = True
            say(
                f"cannot write {self.path}: {error.strerror or error}; the run continues, and "
                f"writes the file again before its next checkpoint"
            )

    def sync(self) -> None:
        """Flush all records to the disk; a later checkpoint relies on them.

        Raises:
            SaveError: They cannot be written.
        """
        if self.path is None:
            return
        with _errors_are_save_errors(self.path):
            # Nothing can be appended to a remote file.
            if self._is_behind or not is_local(self.path):
                write_text(self.path, self._text(), durable=True)
            else:
                with open(self.path, "a", encoding="utf-8") as file:
                    os.fsync(file.fileno())
        self._is_behind = False

    def _text(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)


def read(path: epath.Path) -> Iterator[dict]:
    """Yield the records of a file; skip invalid lines."""
    for line in _lines_of(path):
        if (record := _record(line)) is not None:
            yield record


def _lines_of(path: epath.Path) -> list[bytes]:
    """Return the lines of a file, without a last one that a killed run left incomplete."""
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    return lines if _record(last) is None else [*lines, last]


def _record(line: bytes) -> dict | None:
    """Return the record of a line, a number for each name; None if the line is invalid."""
    try:
        record = reading.parse(line, _RECORD)
    except ValueError:
        return None
    return record if isinstance(step := record.get("step"), int) and step >= 0 else None


@contextlib.contextmanager
def _errors_are_save_errors(path: epath.Path) -> Iterator[None]:
    """Turn an error of the disk or the network into a SaveError that names the file."""
    try:
        yield
    except Exception as error:
        # The clients of buckets raise their own errors.
        if is_local(path) and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SaveError(
            f"cannot write {path}: {reason}; free space there, or correct the permissions, and run "
            f"the same command again"
        ) from error
