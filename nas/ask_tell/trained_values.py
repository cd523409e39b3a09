"""Manage files of trained weights: which ones are still needed, and deletion of the rest.

An evaluator writes `RUN/weights/CANDIDATE-EVALUATION.safetensors` and returns that name as
`trained_values`. A file of that pattern is deleted as soon as its evaluation has ended and no
pending training starts from it, also after an evaluation or a driver has failed.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from gpipe_jax.utils import atomic_files
from nas.ask_tell import pending
from nas.ask_tell.pending import PendingCandidate, Tournament
from nas.errors import LostWeightsError
from nas.evaluators.evaluator import Job, Outcome
from nas.storage.reader import Reader

FOLDER = "weights"
_NAME = re.compile(rf"\d+-(\d+)\.safetensors({atomic_files.DRAFT_SUFFIX})?")


class WeightFiles:
    """Provide the weights that evaluations start from, and remove those no longer needed."""

    def __init__(self, reader: Reader, fitness_policy: str) -> None:
        self.reader, self.run = reader, reader.path.parent
        self.warm = fitness_policy == "retrain_warm"

    def of_candidate(self, candidate: int | None) -> str | None:
        """Return the newest weights of a candidate, or None if there are none to inherit."""
        if candidate is None or not self.warm:
            return None
        return self.if_exists(self.reader.candidate(candidate).trained_values)

    def if_exists(self, weights: str | None) -> str | None:
        """Return the weights, or None if their file was removed."""
        return None if weights is None or is_removed(self.run, weights) else weights

    def check_written(self, trained: Outcome) -> None:
        """Raise LostWeightsError if the outcome's weights are missing in the run's folder."""
        weights = trained.trained_values
        if self.warm and weights is not None and is_removed(self.run, weights):
            raise LostWeightsError(
                f"{trained.worker or 'a worker'} has written the weights {weights}, but in "
                f"{self.run} on this machine there is no such file: with retrain_warm workers "
                "must write into the run's folder itself; resume with workers on this machine, "
                "such as 'devices', or begin a search with another name and fitness_policy "
                "'stored' or 'retrain_scratch'"
            )

    def remove_unneeded(
        self,
        candidates: Mapping[int, PendingCandidate],
        tournaments: Mapping[int, Tournament],
        running: Mapping[int, Job],
    ) -> None:
        """Remove files that belong to no member and from which nothing pending starts."""
        if self.warm:
            drawn = {member.candidate for each in tournaments.values() for member in each.sample}
            inherited = pending.weights_to_inherit(candidates.values(), tournaments.values())
            remove_except(self.run, self.reader.trained_values(drawn) | inherited, running)


def file_name(job: Job) -> str:
    """Return the name of the file of a job's weights, relative to the run's folder."""
    return f"{FOLDER}/{job.candidate}-{job.evaluation}.safetensors"


def is_removed(run: Path, weights: str) -> bool:
    """Return whether the weights have the name of such a file, and the file is missing."""
    folder, _, name = weights.partition("/")
    return folder == FOLDER and _NAME.fullmatch(name) is not None and not (run / weights).exists()


def remove_except(run: Path, needed: Collection[str | None], running: Collection[int]) -> None:
    """Remove the files that are not `needed`, except those of `running` evaluations."""
    if not (run / FOLDER).is_dir():
        return
    for path in (run / FOLDER).iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) not in running and f"{FOLDER}/{path.name}" not in needed:
            path.unlink(missing_ok=True)
