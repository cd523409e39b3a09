"""The training of one candidate: Python is between epochs only, to stop what should be stopped."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nas.training.network import Architecture, Variables
from nas.training.options import RUNG
from nas.training.programs import Programs
from nas.training.recipe import Plan
from nas.workers.threads import check_ending


class Course(NamedTuple):
    """How long, how fast, and what ends it; as in `nas.TrainingEvaluator`."""

    epochs: int
    learning_rate: float
    warmup_epochs: float
    final_epochs: int
    stop_epoch: int | None
    stop_quantile: float
    timeout_s: float | None


class Training:
    """From fresh values, or from a parent's where these agree with `inherit`."""

    def __init__(
        self, programs: Programs, architecture: Architecture, course: Course, seed: int
    ) -> None:
        self._programs, self._architecture, self._course = programs, architecture, course
        self._state, size = programs.start(architecture, np.uint32(seed))
        steps = len(programs.split.labels) // programs.batch_size
        self._plan = Plan(
            np.uint32(seed),
            np.float32(course.learning_rate),
            np.float32(course.warmup_epochs * steps),
            np.float32(course.epochs * steps),
        )
        self.parameters = int(size)

    @property
    def values(self) -> Variables:
        """What the network has learned."""
        return self._state.values

    def inherit(self, parent: Architecture, trained: Variables) -> None:
        """Begin with the parent's values where slot and shape agree."""
        found = self._programs.inherit(self._architecture, parent, self.values, trained)
        self._state = self._state._replace(values=found)

    def run(self, rivals: Sequence[float] = ()) -> dict[str, float]:
        """Fitness and metrics; FloatingPointError or TimeoutError ends it before."""
        course, begun = self._course, time.perf_counter()
        found: dict[str, float] = {"parameters": self.parameters}
        accuracies = []
        for number in range(1, course.epochs + 1):
            found["train_loss"] = self._epoch(number)
            found["train_s"] = time.perf_counter() - begun
            self._check_time(number, found["train_s"])
            check_ending()
            if number == course.stop_epoch:
                found[RUNG] = self.accuracy()
                if self._is_hopeless(found[RUNG], rivals):
                    return {**found, "fitness": found[RUNG], "stopped_at_epoch": number}
            if number > course.epochs - course.final_epochs:
                accuracies.append(self.accuracy())
        found["train_s"] = time.perf_counter() - begun
        return {**found, "fitness": sum(accuracies) / len(accuracies)}

    def accuracy(self) -> float:
        """The fraction of the images held out that are classified rightly."""
        split = self._programs.split
        held_out = (split.held_images, split.held_labels)
        found = float(self._programs.validate(self._architecture, self.values, *held_out))
        if math.isnan(found):
            raise self._diverged("a score of the images held out is not finite")
        return found

    def _epoch(self, number: int) -> float:
        split = self._programs.split
        self._state, loss = self._programs.epoch(
            self._state, self._architecture, self._plan, split.images, split.labels
        )
        loss = float(loss)  # waits, so that no more than one epoch is under way
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} in epoch {number} of {self._course.epochs}")
        return loss

    def _diverged(self, sign: str) -> FloatingPointError:
        return FloatingPointError(
            f"{sign}: the training has diverged; give a lower learning_rate than "
            f"{self._course.learning_rate:g}"
        )

    def _check_time(self, number: int, seconds: float) -> None:
        limit = self._course.timeout_s
        if limit is not None and seconds > limit and number < self._course.epochs:
            raise TimeoutError(
                f"took {seconds:.3g} s for {number} of {self._course.epochs} epochs, more than "
                f"timeout_s {limit:g}"
            )

    def _is_hopeless(self, accuracy: float, rivals: Sequence[float]) -> bool:
        """Below the quantile of the rivals, if they are enough for one to be below it."""
        quantile = self._course.stop_quantile
        return len(rivals) * quantile >= 1 and accuracy < float(np.quantile(rivals, quantile))
