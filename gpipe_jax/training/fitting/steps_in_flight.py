"""Keep several training steps in progress, and record each when it has finished."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from gpipe_jax.training.fitting.divergence import Divergence

Record = Callable[[dict], object]

# Steps that may be in progress at once: enough to hide Python, few enough that jax 0.10's CPU
# collectives cannot deadlock, and that a loss that is not finite is noticed soon.
IN_FLIGHT = 8


class StepsInFlight:
    """Hold the steps that have been started, and record each when it has finished."""

    def __init__(self, divergence: Divergence, record: Record) -> None:
        self._divergence, self._record = divergence, record
        self._steps: deque[tuple[int, dict, float]] = deque()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the next one's."""
        self._clock = time.perf_counter()

    def add(self, step: int, metrics: dict, start_s: float) -> None:
        """Add a step that took `start_s` to start; wait for the oldest one if there are many."""
        self._steps.append((step, metrics, start_s))
        if len(self._steps) >= IN_FLIGHT:
            self._finish_oldest()

    def finish_all(self) -> None:
        """Wait for all steps."""
        while self._steps:
            self._finish_oldest()

    @contextlib.contextmanager
    def finished_before_errors(self) -> Iterator[None]:
        """Finish all steps before an error of the block is raised: they may have diverged."""
        try:
            yield
        except Exception:
            self.finish_all()
            raise

    def _finish_oldest(self) -> None:
        step, metrics, start_s = self._steps.popleft()
        values = {name: float(value) for name, value in metrics.items()}
        self._divergence.check_loss("loss", step, values["loss"])
        self._divergence.last_loss, now = values["loss"], time.perf_counter()
        self._record({"step": step, **values, "step_time_s": max(now - self._clock, start_s)})
        self._clock = now
