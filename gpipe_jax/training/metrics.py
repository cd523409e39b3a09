"""Write the metrics file of a run: one JSON object per line, for logged steps and evaluations."""

import json
import os
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from gpipe_jax.training.writers import Writer
from gpipe_jax.utils.atomic_files import is_local, write_text

Show = Callable[[dict], None]


class MetricsLog:
    """Write `metrics.jsonl`: the first step, every `every`-th step, and every evaluation.

    Records after `step`, where the run resumes, are dropped, because they are written again.

    Args:
        path: The file; None writes none, as in all processes but the first.
        every: Steps between records.
        step: The step at which the run resumes, or 0.
        evaluated: Whether `step` is evaluated already; else its evaluation is dropped too.
        show: A function that gets every record, also those that are not written.
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
        self.records = [
            record
            for record in (read(path) if path else ())
            if record["step"] < step or (record["step"] == step and ("loss" in record or evaluated))
        ]
        if path:
            write_text(path, self._lines(), durable=True)

    def step(self, record: dict) -> None:
        """Show the record of a training step, and write it if it is due."""
        self.show(record)
        if record["step"] % self.every == 0 or record["step"] == 1:
            self._write(record)

    def evaluation(self, record: dict) -> None:
        """Show and write the record of an evaluation."""
        self.show(record)
        self._write(record)

    def _write(self, record: dict) -> None:
        self.records.append(record)
        for writer in self.writers:
            writer.write(record)
        if self.path and is_local(self.path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Flush all records to the disk; a later checkpoint relies on them."""
        if self.path and not is_local(self.path):  # nothing can be appended to a remote file
            self.path.write_text(self._lines())
        elif self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def _lines(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)


def read(path: epath.Path) -> Iterator[dict]:
    """Yield the records of a file; skip a line that a killed run left incomplete."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
