"""The metrics file of a run: one JSON object a line, for logged steps and evaluations."""

import json
import os
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from gpipe_jax.training.writers import Writer
from gpipe_jax.utils.atomic_files import is_local, write_text

Show = Callable[[dict], None]


class MetricsLog:
    """`metrics.jsonl`: every `every`-th step, the first one, and every evaluation.

    What lies after `step`, where the run continues, is dropped, for it is written again; as is its
    evaluation, unless it is `evaluated`. Without a `path` nothing is written, but all is shown.
    What is written, the `writers` are told too.
    """

    def __init__(
        self,
        path: epath.Path | None,
        every: int,
        step: int,
        evaluated: bool,
        show: Show,
        writers: Sequence[Writer] = (),
    ) -> None:
        self.path, self.every, self.show, self.writers = path, every, show, writers
        self.records = [
            r
            for r in (read(path) if path else ())
            if r["step"] < step or (r["step"] == step and ("loss" in r or evaluated))
        ]
        if path:
            lines = (json.dumps(r) + "\n" for r in self.records)
            write_text(path, "".join(lines), durable=True)

    def step(self, record: dict) -> None:
        """A training step."""
        self.show(record)
        if record["step"] % self.every == 0 or record["step"] == 1:
            self._write(record)

    def evaluation(self, record: dict) -> None:
        """An evaluation."""
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
        """Have it all on the disk, which a checkpoint that comes later relies on."""
        if self.path and not is_local(self.path):  # nothing can be added to a remote file
            self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        elif self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())


def read(path: epath.Path) -> Iterator[dict]:
    """The records of a file, without what a run that was cut off left of a line."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
