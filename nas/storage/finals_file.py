"""Keep the results of candidates that an export trained again, beside the store."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpipe_jax.utils import atomic_files
from nas.storage.reader import Reader

FILE = "finals.json"


class Retrained(NamedTuple):
    """What came of training a candidate again."""

    candidate: int
    epochs: int | None  # None in files of older versions
    fitness: float


def read_finals(reader: Reader) -> list[Retrained]:
    """All that has been trained again so far, the best first."""
    found = [
        Retrained(int(key[1:].partition(",")[0]), one.get("epochs"), one["fitness"])
        for key, one in read_entries(reader.path.parent / FILE).items()
    ]
    return sorted(found, key=lambda one: one.fitness, reverse=reader.study().maximise)


def read_entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_entries(path: Path, done: dict[str, Any]) -> None:
    atomic_files.write_text(path, json.dumps(done, indent=1) + "\n")
