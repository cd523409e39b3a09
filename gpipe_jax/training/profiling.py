"""Where the time of a run went."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath

PARTS = ("compile", "data", "checkpoint", "evaluation")


class Timings:
    """Seconds by part; what is no part is training. Parts within parts count once, as the inner."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Book the block's time on a part."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[part] += time.perf_counter() - start - inner


class Profile(NamedTuple):
    """Which steps are traced, from 1, and where the trace goes; none without a folder."""

    start: int
    steps: int
    folder: epath.Path | None

    def until(self, step: int) -> int | None:
        """The step up to which the next ones are all traced, or all not; None for all of them."""
        ends = [end for end in (self.start - 1, self.start - 1 + self.steps) if end > step]
        return ends[0] if self.steps and ends else None

    def over(self, step: int) -> contextlib.AbstractContextManager:
        """The context that the steps after `step` run in."""
        traced = self.start - 1 <= step < self.start - 1 + self.steps
        if self.folder is None or not traced:
            return contextlib.nullcontext()
        return jax.profiler.trace(str(self.folder))
