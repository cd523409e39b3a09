"""Stop a training whose evaluations no longer improve."""

import math
from typing import Literal

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean_or_list

MODES = ("min", "max")


class EarlyStopping:
    """Stop after `patience` evaluations in a row without a better value: a callback of `fit`.

    It sees evaluations only, so it stops exactly at the step of one. The state at the end is that
    of this step; the best one is not kept. A value that is NaN is never better. Each `fit` begins
    as if there had been no evaluation before it; a run of `gpipe train` that resumes does not.

    In a config it is `function: "gpipe_jax:EarlyStopping"` in `train.callbacks`, and
    `train.keep_best` keeps the best checkpoints.

    Args:
        metric: The name of a number in the record of an evaluation. Default: "test_loss".
        patience: Evaluations in a row without a better value, after which training stops.
            Default: 3.
        min_delta: The least difference that makes a value better than the best one. Default: 0;
            then any difference does.
        mode: Whether "min" or "max" is best. Default: "max" for a metric whose name ends with
            "accuracy", else "min".

    Attributes:
        best: The best value so far; None before the first evaluation that gives a number.
        best_step: The step of the best value; None without one.

    Raises:
        ArgumentError: A setting has no meaning, or, when called, there is no such metric.

    Example::

        stop = gpipe.EarlyStopping(patience=2)
        current = trainer.fit(
            trainer.init(seed=0), [batch] * 60, evaluate=[batch], every=20, callbacks=[stop]
        )
        print(stop.best, stop.best_step)
    """

    def __init__(
        self,
        metric: str = "test_loss",
        *,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        if mode is not None and mode not in MODES:
            raise ArgumentError("mode", f"`mode` must be 'min' or 'max', got {mode!r}")
        if not min_delta >= 0:
            raise ArgumentError("min_delta", f"`min_delta` must be at least 0, got {min_delta!r}")
        self.metric, self.min_delta = metric, min_delta
        self.patience = check_count("patience", patience)
        self.mode = mode or ("max" if metric.endswith("accuracy") else "min")
        self.reset()

    def reset(self) -> None:
        """Forget all evaluations; `fit` does this when it begins."""
        self.best: float | None = None
        self.best_step: int | None = None
        self._without_improvement = 0

    def __call__(self, record: dict) -> bool:
        """Return whether to stop; a record of a training step never stops."""
        if "test_loss" not in record:
            return False
        value = self._value(record)
        if self._is_better(value):
            self.best, self.best_step, self._without_improvement = value, record["step"], 0
        else:
            self._without_improvement += 1
        return self._without_improvement >= self.patience

    def _value(self, record: dict) -> float:
        if self.metric not in record:
            names = [name for name in record if name != "step"]
            raise ArgumentError(
                "metric",
                f"`metric` {self.metric!r} is not in the record of an evaluation"
                f"{did_you_mean_or_list(self.metric, names)}",
            )
        return record[self.metric]

    def _is_better(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > 0 and gain >= self.min_delta
