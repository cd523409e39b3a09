"""Measure where the time of a run goes, and trace some of its steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath

from gpipe_jax.utils.messages import say

ACTIVITIES = ("compile", "data", "checkpoint", "evaluation")


class Timings:
    """Sum up seconds by activity; all other time is training.

    An activity within another counts once, as the inner one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(ACTIVITIES, 0.0)

    @contextlib.contextmanager
    def spend(self, activity: str) -> Iterator[None]:
        """Count the block's time as an activity."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[activity] += time.perf_counter() - start - inner


class Profile(NamedTuple):
    """Say which steps are traced, and into which folder; None traces nothing."""

    start: int  # the first traced step; steps count from 1
    steps: int
    folder: epath.Path | None

    def until(self, step: int) -> int | None:
        """Return the step up to which the next ones are all traced, or all not; None: the end."""
        ends = [end for end in (self.start - 1, self.start - 1 + self.steps) if end > step]
        return ends[0] if self.steps and ends else None

    def over(self, step: int) -> contextlib.AbstractContextManager:
        """Return the context in which the steps after `step` run."""
        traced = self.start - 1 <= step < self.start - 1 + self.steps
        if self.folder is None or not traced:
            return contextlib.nullcontext()
        return traced_into(self.folder)


@contextlib.contextmanager
def traced_into(folder: epath.Path) -> Iterator[None]:
    """Trace the block with jax.profiler; if that fails, say so and run the block."""
    is_tracing = False
    with _errors_are_messages(folder):
        folder.mkdir(parents=True, exist_ok=True)  # JAX would find out at the end, and trace on
        jax.profiler.start_trace(str(folder))
        is_tracing = True
    try:
        yield
    finally:
        with _errors_are_messages(folder):
            if is_tracing:
                jax.profiler.stop_trace()


@contextlib.contextmanager
def _errors_are_messages(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        say(f"no trace in {folder}: {reason}")
