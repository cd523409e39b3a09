"""A trace of some steps, by jax.profiler, in the folder `profile` of the run."""

import contextlib
from typing import NamedTuple

import jax
from etils import epath


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
