"""Trained values that are files beside a search's store, and which of them may go.

An evaluator writes `RUN/weights/CANDIDATE-EVALUATION.safetensors`, and returns that name as
`trained_values`. Whatever ends an evaluation or a driver, a file of that pattern is removed as soon
as its evaluation is over and no one will start from it.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from nas.ask_tell import pending
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.errors import LostWeightsError
from nas.evaluators.evaluator import Job, Outcome
from nas.storage.reader import Reader

FOLDER = "weights"
_NAME = re.compile(r"\d+-(\d+)\.safetensors(\.\d+\.tmp)?")


class WeightFiles:
    """What evaluations start from: trained values, where the policy is to, and what rivals had."""

    def __init__(self, reader: Reader, fitness_policy: str, compare: str | None) -> None:
        self.reader, self.run = reader, reader.path.parent
        self.warm, self.compare = fitness_policy == "retrain_warm", compare

    def rivals(self, candidate: int) -> tuple[float, ...]:
        """The metric to compare by, of the members as of the candidate's proposal."""
        return self.reader.rivals(candidate, self.compare) if self.compare else ()

    def of_candidate(self, candidate: int | None) -> str | None:
        """Where to start from, after this candidate: as it was trained, if that is still there."""
        if candidate is None or not self.warm:
            return None
        return self.if_exists(self.reader.candidate(candidate).trained_values)

    def if_exists(self, values: str | None) -> str | None:
        """The same, or None if it is gone."""
        return None if values is None or is_removed(self.run, values) else values

    def check_written(self, trained: Outcome) -> None:
        """Raise LostValuesError if what has just been trained is nowhere to start from."""
        values = trained.trained_values
        if self.warm and values is not None and is_removed(self.run, values):
            raise LostWeightsError(
                f"{trained.worker or 'a worker'} has written the trained values {values}, but in "
                f"{self.run} on this machine there is no such file: with retrain_warm workers "
                "must write into the run's folder itself; resume with workers on this machine, "
                "such as 'devices', or begin a search with another name and fitness_policy "
                "'stored' or 'retrain_scratch'"
            )

    def remove_unneeded(
        self,
        waiting: Mapping[int, PendingCandidate],
        tournaments: Mapping[int, Tournament],
        running: Mapping[int, Job],
    ) -> None:
        """Remove the files that no member has and nothing of these may start from."""
        if self.warm:
            drawn = {member.candidate for found in tournaments.values() for member in found.sample}
            inherited = pending.weights_to_inherit(waiting.values(), tournaments.values())
            remove_unneeded(self.run, self.reader.trained_values(drawn) | inherited, running)


def file_name(job: Job) -> str:
    """Of the file for what the job trains, from the run's folder."""
    return f"{FOLDER}/{job.candidate}-{job.evaluation}.safetensors"


def is_removed(run: Path, values: str) -> bool:
    """Whether these were a file that has been removed."""
    folder, _, name = values.partition("/")
    return folder == FOLDER and _NAME.fullmatch(name) is not None and not (run / values).exists()


def remove_unneeded(run: Path, needed: Collection[str | None], running: Collection[int]) -> None:
    """Remove the files that are not `needed`, but those of evaluations that are `running`."""
    if not (run / FOLDER).is_dir():
        return
    for path in (run / FOLDER).iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) not in running and f"{FOLDER}/{path.name}" not in needed:
            path.unlink(missing_ok=True)
