"""Trained values that are files beside a search's store, and which of them may go.

An evaluator writes `RUN/weights/CANDIDATE-EVALUATION.safetensors`, and returns that name as
`trained_values`. Whatever ends an evaluation or a driver, a file of that pattern is removed as soon
as its evaluation is over and no one will start from it.
"""

import re
from collections.abc import Collection
from pathlib import Path

from nas.evaluate import Job

FOLDER = "weights"
_NAME = re.compile(r"\d+-(\d+)\.safetensors(\.\d+\.tmp)?")


def name_of(job: Job) -> str:
    """Of the file for what the job trains, from the run's folder."""
    return f"{FOLDER}/{job.candidate}-{job.evaluation}.safetensors"


def is_gone(run: Path, values: str) -> bool:
    """Whether these were a file that has been removed."""
    folder, _, name = values.partition("/")
    return folder == FOLDER and _NAME.fullmatch(name) is not None and not (run / values).exists()


def sweep(run: Path, needed: Collection[str | None], running: Collection[int]) -> None:
    """Remove the files that are not `needed`, but those of evaluations that are `running`."""
    if not (run / FOLDER).is_dir():
        return
    for path in (run / FOLDER).iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) not in running and f"{FOLDER}/{path.name}" not in needed:
            path.unlink(missing_ok=True)
