"""Train one candidate: a loop over epochs, each of which is one call of a compiled program."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nas.evaluators.evaluator import RUNG
from nas.training.network import Architecture, Variables
from nas.training.programs import Programs
from nas.training.recipe import Scalars
from nas.workers.threads import check_ending


class TrainingSettings(NamedTuple):
    """Say how long to train, how fast to learn, and when to stop; see `nas.TrainingEvaluator`."""

    epochs: int
    learning_rate: float
    warmup_epochs: float
    final_epochs: int
    stop_epoch: int | None
    stop_quantile: float
    timeout_s: float | None


class Training:
    """Train a network from initial values, or, after `inherit`, from its parent's."""

    def __init__(
        self,
        programs: Programs,
        architecture: Architecture,
        settings: TrainingSettings,
        seed: int,
    ) -> None:
        self._programs, self._architecture, self._settings = programs, architecture, settings
        self._state, parameters = programs.start(architecture, np.uint32(seed))
        steps = len(programs.split.labels) // programs.batch_size  # in an epoch
        self._scalars = Scalars(
            seed=np.uint32(seed),
            learning_rate=np.float32(settings.learning_rate),
            warmup_steps=np.float32(settings.warmup_epochs * steps),
            steps=np.float32(settings.epochs * steps),
        )
        self.parameters = int(parameters)

    @property
    def values(self) -> Variables:
        """Return the parameters and statistics as they are now."""
        return self._state.values

    def inherit(self, parent: Architecture, trained: Variables) -> None:
        """Start from the parent's values where both architectures agree."""
        values = self._programs.inherit(self._architecture, parent, self.values, trained)
        self._state = self._state._replace(values=values)

    def run(self, rivals: Sequence[float] = ()) -> dict[str, float]:
        """Train to the end and return the fitness and metrics.

        Args:
            rivals: Accuracies of the population's members after `stop_epoch`.

        Raises:
            FloatingPointError: The training diverged.
            TimeoutError: It took longer than `timeout_s`.
        """
        settings, started = self._settings, time.perf_counter()
        metrics: dict[str, float] = {"parameters": self.parameters}
        accuracies = []
        for number in range(1, settings.epochs + 1):
            metrics["train_loss"] = self._epoch(number)
            metrics["train_s"] = time.perf_counter() - started
            self._check_time(number, metrics["train_s"])
            check_ending()
            if number == settings.stop_epoch:
                metrics[RUNG] = self.accuracy()
                if self._is_hopeless(metrics[RUNG], rivals):
                    return {**metrics, "fitness": metrics[RUNG], "stopped_at_epoch": number}
            if number > settings.epochs - settings.final_epochs:
                accuracies.append(self.accuracy())
        metrics["train_s"] = time.perf_counter() - started
        return {**metrics, "fitness": sum(accuracies) / len(accuracies)}

    def accuracy(self) -> float:
        """Return the validation accuracy: the fraction of the held-out images classified right."""
        split = self._programs.split
        held_out = (split.held_images, split.held_labels)
        accuracy = float(self._programs.validate(self._architecture, self.values, *held_out))
        if math.isnan(accuracy):
            raise self._diverged("a score of a validation image is not finite")
        return accuracy

    def _epoch(self, number: int) -> float:
        split = self._programs.split
        self._state, loss = self._programs.epoch(
            self._state, self._architecture, self._scalars, split.images, split.labels
        )
        loss = float(loss)  # waits, so that at most one epoch is queued
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss} in epoch {number} of {self._settings.epochs}")
        return loss

    def _diverged(self, sign: str) -> FloatingPointError:
        return FloatingPointError(
            f"{sign}: the training has diverged; use a lower learning_rate than "
            f"{self._settings.learning_rate:g}"
        )

    def _check_time(self, number: int, seconds: float) -> None:
        limit, epochs = self._settings.timeout_s, self._settings.epochs
        if limit is not None and seconds > limit and number < epochs:
            raise TimeoutError(
                f"took {seconds:.3g} s for {number} of {epochs} epochs, more than timeout_s "
                f"{limit:g}"
            )

    def _is_hopeless(self, accuracy: float, rivals: Sequence[float]) -> bool:
        """Return whether the accuracy is below the rivals' `stop_quantile`.

        It never is while there are fewer than 1 / `stop_quantile` rivals.
        """
        quantile = self._settings.stop_quantile
        return len(rivals) * quantile >= 1 and accuracy < float(np.quantile(rivals, quantile))
