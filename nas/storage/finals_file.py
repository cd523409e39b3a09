"""Store the results of candidates that an export trained again, in a file beside the store."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpipe_jax.utils import atomic_files
from nas.storage.old_names import current_evaluator
from nas.storage.reader import Reader

FILE = "finals.json"


class Retrained(NamedTuple):
    """Hold the result of training a candidate again."""

    candidate: int
    epochs: int | None  # None in files of older versions
    fitness: float


def read_finals(reader: Reader) -> list[Retrained]:
    """Return all candidates that have been trained again so far, the best first."""
    finals = [
        Retrained(int(key[1:].partition(",")[0]), entry.get("epochs"), entry["fitness"])
        for key, entry in read_entries(reader.path.parent / FILE).items()
    ]
    return sorted(finals, key=lambda final: final.fitness, reverse=reader.study().maximise)


def key_of(candidate: int, evaluator: dict[str, Any]) -> str:
    """Return the key of a candidate trained by this evaluator (see `identity_of`)."""
    return f"#{candidate}, {json.dumps(evaluator)}"


def read_entries(path: Path) -> dict[str, Any]:
    """Read the file's entries by key; empty if there is no file."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {_current_key(key): entry for key, entry in entries.items()}


def _current_key(key: str) -> str:
    candidate, _, identity = key[1:].partition(", ")
    try:
        return key_of(int(candidate), current_evaluator(json.loads(identity)))
    except ValueError:  # a key of another version: keep it
        return key


def write_entries(path: Path, entries: dict[str, Any]) -> None:
    """Write the file, which replaces the old one at once."""
    atomic_files.write_text(path, json.dumps(entries, indent=1) + "\n")
